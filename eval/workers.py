"""Who answers: this process, or several, one a GPU or a share of the CPU's cores each.

    every process: model, all requests of a cell in the same batches -> its share of the images, then of the batches
    messages to the caller: Encoded(images) ... Answered(task, shots, records, images) ...

The batches follow from the plan and batch_size alone, and a process takes every n-th of them: nothing needs to be dealt out.
Results are put in the plan's order when a cell is complete: they are the same bytes for any number of processes.
"""

from __future__ import annotations

import queue
import traceback
from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from eval.device import pick_device
from mm1.cpu import use_whole_width, whole_width_in_use

if TYPE_CHECKING:
    from eval.fewshot import EvalConfig

SMALL_MODEL = 50_000_000
"""Parameters below which one CPU thread decodes fastest: a step's matrices are too small to share, and on a machine with other
work the threads wait for each other at every one of them (measured with 5.6M parameters, 2 busy cores: 4 times slower with
two)."""

Cell = tuple[str, int]
"""(task, shots)"""


@dataclass(frozen=True)
class Encoded:
    """So many images are encoded, or were found in the file."""

    images: int


@dataclass(frozen=True)
class Answered:
    """A batch of a cell. `images`: how many its prompts show, what it counts for in the progress bar."""

    cell: Cell
    records: list[dict[str, Any]]
    images: int


Message = Encoded | Answered


class Worker:
    """A process's model, and its share of the work: number `index` of `count`."""

    def __init__(self, config: EvalConfig, target: Any, results: Any, index: int = 0, count: int = 1) -> None:
        import torch

        from eval.features import ImageFeatures
        from eval.generate import caches, load_model
        from eval.prompter import Prompter

        self.config, self.results, self.index, self.count = config, results, index, count
        device = device_of(config.device, index)
        self.model, self.tokenizer = load_model(target.export, device, config.dtype)
        if device == "cpu" and (config.threads or count > 1 or self.model.num_parameters() < SMALL_MODEL):
            torch.set_num_threads(config.threads or 1)
        self.new_cache = caches(self.model, results.sparq)
        self.features = ImageFeatures(
            self.model, device, config.image_memory_gb * 10**9, spill=results.features, key=target.weights
        )
        self.prompters = {name: Prompter(results, task, self.features.register) for name, task in results.tasks.items()}
        for prompter in self.prompters.values():
            prompter.register_images()

    def encode(self) -> Iterator[Message]:
        """Its share of the images, each once, before anything is answered."""
        yield from map(Encoded, self.features.encode_all(self.index, self.count))

    def answer(self, done: Mapping[Cell, set[str]]) -> Iterator[Message]:
        """Its share of the batches of the cells in `done`, but for the items answered before an interruption."""
        from eval.generate import Generator

        for (task, shots), known in done.items():
            settings, prompter = self.results.settings[task], self.prompters[task]
            generator = Generator(
                self.model,
                self.tokenizer,
                self.features,
                stop=settings.stop,
                max_new_tokens=settings.max_new_tokens,
                new_cache=self.new_cache,
            )
            queries = self.results.plan.tasks[task].queries
            requests = [prompter.request(query, shots) for query in queries]
            for batch in generator.batches(requests, self.config.batch_size)[self.index :: self.count]:
                records = []
                if any(queries[i] not in known for i in batch):  # whole batches: a row's last bits may hang on its neighbours
                    answers = generator.answer([requests[i] for i in batch])
                    records = [prompter.record(queries[i], shots, answer) for i, answer in zip(batch, answers, strict=True)]
                new = [record for record in records if record["id"] not in known]
                yield Answered((task, shots), new, len(batch) * (shots + 1))


def device_of(device: str, index: int) -> str:
    """`auto`: the GPUs in turn, or the CPU. Raises UserError for a device that is not there."""
    import torch

    device = pick_device(device)
    return f"cuda:{index % torch.cuda.device_count()}" if device == "cuda" else device


def processes_of(config: EvalConfig) -> int:
    """As many as asked for; by default one a GPU, or one."""
    import torch

    if config.processes is not None:
        return config.processes
    return max(1, torch.cuda.device_count()) if config.device in ("auto", "cuda") else 1


def messages(config: EvalConfig, target: Any, results: Any, done: Mapping[Cell, set[str]]) -> abc.Generator[Message, None, None]:
    """What `processes` workers report, until all is answered. Raises UserError where one of them does, or when one dies, and
    RuntimeError with the traceback of what else one raises."""
    count = processes_of(config)
    if count == 1:
        worker = Worker(config, target, results)
        yield from worker.encode()
        yield from worker.answer(done)
        return
    import multiprocessing

    context = multiprocessing.get_context("spawn")  # a fork would lose what CUDA holds
    sent, encoded = context.Queue(), context.Barrier(count)
    given = (config, dict(done), count, whole_width_in_use(), sent, encoded)
    processes = [context.Process(target=_work, args=(index, *given), daemon=True) for index in range(count)]
    for process in processes:
        process.start()
    try:
        running = count
        while running:
            try:
                message = sent.get(timeout=1)
            except queue.Empty:
                died = [process for process in processes if process.exitcode not in (None, 0)]
                if died:
                    raise UserError(_obituary(died[0].exitcode or 0)) from None
                continue
            if isinstance(message, Exception):
                raise message
            if message is None:
                running -= 1
            else:
                yield message
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _obituary(code: int) -> str:
    """A process that says nothing was killed (a negative code: by that signal) or could not start, and wrote why itself."""
    why = "most often because memory ran out: lower processes or batch_size." if code < 0 else "for what it wrote above."
    return f"An evaluation process ended with code {code}, {why} The same command goes on where it stopped."


def _work(index: int, config: EvalConfig, done: dict[Cell, set[str]], count: int, wide: bool, sent: Any, encoded: Any) -> None:
    """A worker process. It plans for itself: nothing but settings and ids crosses."""
    if wide:  # as in the process that started this one, or their last bits would differ
        use_whole_width()
    from data_pipelines.loader import die_with_parent
    from eval.fewshot import prepare

    die_with_parent()
    try:
        worker = Worker(config, *prepare(config), index, count)
        for message in worker.encode():
            sent.put(message)
        encoded.wait()
        for message in worker.answer(done):
            sent.put(message)
        sent.put(None)
    except UserError as error:
        sent.put(error)
    except Exception:
        sent.put(RuntimeError(f"An evaluation process failed:\n{traceback.format_exc()}"))
