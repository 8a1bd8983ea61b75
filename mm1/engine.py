"""DeepSpeed: the one place that knows it.

One process without a launcher, `deepspeed --num_accelerators N --no_local_rank --module mm1.train ...` on one machine, or a
hostfile over many: all arrive here with RANK, LOCAL_RANK and WORLD_SIZE in the environment (or none of them) and leave with an
Engine. The precision, ZeRO stage, accumulation and clipping of the configuration become DeepSpeed's; `engine.deepspeed` is merged
over them.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.errors import UserError

if TYPE_CHECKING:
    from mm1.config import EngineConfig, OptimConfig

PARTIAL = ".partial"
"""Ends the name of a checkpoint's folder until it is whole."""


def choose_device(requested: str) -> str:
    """auto -> cuda where there is one. Raises UserError for cuda without a GPU."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device=cuda, but torch sees no GPU here. Use engine.device=cpu or auto.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if requested == "auto" else requested


class Workers:
    """The processes that train together: who they are, and the few collectives the trainer needs."""

    def __init__(self, settings: EngineConfig) -> None:
        self.kind = choose_device(settings.device)
        os.environ.setdefault("DS_ACCELERATOR", self.kind)
        # DeepSpeed's own progress chatter goes to the log level a user would choose for a library.
        os.environ.setdefault("DS_LOG_LEVEL", "warning")
        if "WORLD_SIZE" not in os.environ:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", self.local_rank) if self.kind == "cuda" else torch.device("cpu")
        if self.kind == "cuda":
            torch.cuda.set_device(self.device)
        else:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
            torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) // local))
        with _quiet():
            import deepspeed

            logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
            if self.world == 1:
                # Shared-memory collectives are of no use to one process, and compiling them would take it half a minute. The
                # attribute deepspeed.comm.torch is torch itself, not the module of that name.
                vars(import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
            backend = "nccl" if self.kind == "cuda" else "gloo"
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sum over all processes, in float64."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """One value a process, in rank order, on every process."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class Engine:
    """A model under DeepSpeed: forward, backward, step, save, load, and whole weights to export."""

    def __init__(
        self,
        model: torch.nn.Module,
        groups: list[dict[str, Any]],
        workers: Workers,
        settings: EngineConfig,
        optim: OptimConfig,
        global_batch: int,
    ) -> None:
        import deepspeed

        self.workers, self.settings = workers, settings
        # DeepSpeed broadcasts weights as flat bytes: channels_last ones have to be laid out plainly
        for parameter in model.parameters():
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype).copy_(parameter.data)
        share = global_batch // workers.world
        self.accumulation = share // settings.micro_batch
        betas, fused = (optim.beta1, optim.beta2), settings.stage < 3 or None
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=optim.eps, fused=fused)
        config: dict[str, Any] = {
            "train_batch_size": global_batch,
            "train_micro_batch_size_per_gpu": settings.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": optim.grad_clip,
            "zero_optimization": {"stage": settings.stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": settings.precision == "bf16"},
            "steps_per_print": 2**31,
        }
        config = merged(config, settings.deepspeed)
        with _quiet():
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=model.to(workers.device), optimizer=optimizer, config=config, dist_init_required=False
            )
        self.module = self.deepspeed.module
        for module in self.module.modules():
            # DeepSpeed casts parameters and leaves buffers; a batch norm wants its statistics in the dtype of its weights.
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.weight is not None:
                for buffer in module.buffers(recurse=False):
                    if buffer.is_floating_point():
                        buffer.data = buffer.data.to(module.weight.dtype)
        self.grad_norm = float("nan")
        """Global gradient norm of the last optimiser step, before clipping."""
        self._plain = settings.stage == 0 and settings.precision == "fp32"

    def __call__(self, **inputs: Any) -> Any:
        return self.deepspeed(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """`loss`: this micro-batch's share of the *global* loss, a sum over tokens already divided by the global token count.

        DeepSpeed divides by the accumulation steps and averages over ranks; both are undone here, so that gradients add up to
        exactly those of one process with the whole batch, however the tokens are spread.
        """
        self.deepspeed.backward(loss * (self.accumulation * self.workers.world))

    def step(self, learning_rate: float) -> None:
        """Called after every backward; the optimiser moves at the accumulation boundary."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        boundary = self.deepspeed.is_gradient_accumulation_boundary()
        if boundary and self._plain:
            # Without ZeRO and bf16, DeepSpeed clips but does not say what it clipped; the gradients are whole and averaged here.
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self.grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        self.deepspeed.step()
        if boundary and not self._plain:
            self.grad_norm = float(self.deepspeed.get_global_grad_norm())

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Save weights, optimiser and `state` (plain values), on all ranks together; the folder appears only when it is whole."""
        partial = folder.with_name(folder.name + PARTIAL)
        if self.workers.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.workers.barrier()
        with _quiet():
            self.deepspeed.save_checkpoint(str(partial), tag="state", client_state=state, save_latest=False)
        self.workers.barrier()
        if self.workers.main:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        self.workers.barrier()

    def load(self, folder: Path) -> dict[str, Any]:
        """Go back to a saved state; returns what was given to `save`. UserError for one saved by another number of processes."""
        with _quiet(), _weights_only():
            try:
                path, state = self.deepspeed.load_checkpoint(str(folder), tag="state")
            except Exception as error:
                raise UserError(
                    f"{folder} cannot be resumed with {self.workers.world} processes and "
                    f"engine.zero_stage={self.settings.stage}: "
                    f"{str(error).splitlines()[0][:300] if str(error) else type(error).__name__}"
                ) from error
        if path is None:
            raise UserError(f"{folder} is no checkpoint of this engine. Delete it to go on from the one before.")
        return state

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole weights on the CPU (on rank 0; empty elsewhere), gathered from the shards under ZeRO-3. Tied weights stay one."""
        import deepspeed

        sharded = list(self.module.parameters()) if self.settings.stage == 3 else []
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            copies: dict[int, torch.Tensor] = {}
            named = self.module.state_dict(keep_vars=True) if self.workers.main else {}
            for tensor in named.values():
                copies.setdefault(id(tensor), tensor.detach().cpu().clone())
            return {name: copies[id(tensor)] for name, tensor in named.items()}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section: what `over` does not name stays."""
    both = {key: merged(base[key], over[key]) for key in over if isinstance(base.get(key), dict) and isinstance(over[key], dict)}
    return base | over | both


@contextmanager
def _weights_only() -> Iterator[None]:
    """Let torch.load inside DeepSpeed unpickle tensors and plain values only, and the few optimiser classes DeepSpeed stores."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    original = torch.load

    def load(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **(kwargs | {"weights_only": True}))

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        torch.load = load
        try:
            yield
        finally:
            torch.load = original


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings libraries raise on import and set-up that a user can do nothing about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
