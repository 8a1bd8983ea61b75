"""The one exception that means "the user can mend this".

Every command prints it without a traceback, so its text must stand alone: the file or key concerned, the value found, and what
to do about it.
"""


class UserError(Exception):
    """A wrong setting, a missing or damaged file, an impossible combination: never a defect of the suite itself."""
