"""The YAML that composes the suite, and (in command.py) the one way its commands are started."""

from pathlib import Path

CONFIG_DIR = Path(__file__).resolve().parent
