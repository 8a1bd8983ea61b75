"""Features of frozen image encoders, kept on disk: same weights to the bit, shared, bounded, safe to kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.command import compose
from configs.errors import UserError
from mm1 import feature_store, features
from mm1.config import EngineConfig, TrainConfig
from mm1.feature_store import ENTRY, FeatureStore
from mm1.features import FrozenEncoder
from tests.corpus import write_corpus
from tests.models import TRAIN_OVERRIDES, tiny_model
from tests.test_trainer import curve, kill_after_a_checkpoint, metrics, the_run, train

FROZEN = ("image_encoder.train=frozen", "train.validation_sequences=0")
SHAPE = (3, 5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "tiny", captions=32)


def weights(home: Path) -> dict[str, torch.Tensor]:
    return load_file(the_run(home) / "export" / "model.safetensors")


def info(home: Path) -> dict[str, Any]:
    return json.loads((the_run(home) / "run.json").read_text())


def again(home: Path, cache: Path) -> Path:
    """Another home with the same store."""
    home.mkdir()
    (home / "cache").symlink_to(cache)
    return home


def same_bits(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.fixture(scope="module")
def off(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps nothing."""
    home = tmp_path_factory.mktemp("off")
    train(home, corpus, *FROZEN, "engine.feature_cache_gb=0")
    assert not (home / "cache" / "features").exists()
    return home


# ----------------------------------------------------------------------------------------------------------- whole trainings


def test_cold_warm_and_off_train_the_same_weights(corpus: Path, off: Path, tmp_path: Path) -> None:
    """Through the command, with workers and without; the second run computes nothing, and no run's hash knows of it."""
    cold, warm = tmp_path / "cold", tmp_path / "warm"
    (tmp_path / "cache").mkdir()
    train(again(cold, tmp_path / "cache"), corpus, *FROZEN, "engine.workers=2")
    output = train(again(warm, tmp_path / "cache"), corpus, *FROZEN)
    assert same_bits(weights(off), weights(cold))
    assert same_bits(weights(off), weights(warm))
    assert curve(off) == curve(cold) == curve(warm)
    assert the_run(off).name == the_run(cold).name == the_run(warm).name
    counts = [(info(h)["features_read"], info(h)["features_computed"]) for h in (off, cold, warm)]
    seen = info(off)["images_seen"]
    assert counts[0] == (0, seen)
    assert counts[2] == (seen, 0)
    assert sum(counts[1]) == seen
    assert counts[1][0] > 0  # eight pictures, again and again
    assert metrics(warm)[-1]["features_read"] == 1
    assert "8 pictures in" in output
    assert [info(h)["flops"] for h in (off, cold, warm)] == [info(off)["flops"]] * 3


def test_a_killed_run_goes_on_to_the_bit(corpus: Path, off: Path, home: Path) -> None:
    kill_after_a_checkpoint(home, corpus, *FROZEN, "train.checkpoint_every=4")
    assert "Going on from step" in train(home, corpus, *FROZEN, "train.checkpoint_every=4")
    assert same_bits(weights(off), weights(home))
    assert info(home)["features_read"] + info(home)["features_computed"] == info(home)["images_seen"]


def test_two_processes_share_a_store(corpus: Path, off: Path, home: Path) -> None:
    train(home, corpus, *FROZEN, "engine.micro_batch=2", ranks=2)
    for (loss, norm), (expected_loss, expected_norm) in zip(curve(home), curve(off), strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-4)
        assert norm == pytest.approx(expected_norm, rel=2e-3)
    (store,) = (home / "cache" / "features").glob("*/index.bin")
    assert store.stat().st_size == 8 * ENTRY.size  # eight pictures, each once
    assert info(home)["features_read"] + info(home)["features_computed"] == info(home)["images_seen"]


def test_zero_3_says_that_nothing_is_kept(corpus: Path, home: Path) -> None:
    output = train(home, corpus, *FROZEN, "engine.zero_stage=3", "train.steps=4")
    assert "ZeRO-3 shares out the frozen image encoder's weights" in output
    assert not (home / "cache" / "features").exists()


def test_a_full_store_is_said_and_trains_the_same(corpus: Path, off: Path, home: Path) -> None:
    """Room for three of the eight pictures (16 patches of 16 float32 each)."""
    output = train(home, corpus, *FROZEN, f"engine.feature_cache_gb={3 * (1024 + ENTRY.size) / 1e9:.9f}")
    assert output.count("are not kept:") == 1
    assert "engine.feature_cache_gb=3" in output
    (store,) = (home / "cache" / "features").glob("*/features.bin")
    assert store.stat().st_size == 3 * 1024
    assert same_bits(weights(off), weights(home))
    assert info(home)["features_computed"] > 3


def test_a_trained_encoder_leaves_no_features(corpus: Path, home: Path) -> None:
    train(home, corpus, "train.steps=4")
    assert not (home / "cache" / "features").exists()
    assert "features_computed" not in info(home)


# ----------------------------------------------------------------------------------------------------------------- the store


def keys(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def values(*numbers: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Features that tell their number."""
    return torch.stack([torch.arange(15.0).view(SHAPE) + 100 * number for number in numbers]).to(dtype)


def opened(folder: Path, bound: float = 1e9, dtype: torch.dtype = torch.float32, **about: Any) -> FeatureStore:
    return FeatureStore(folder, about, SHAPE, dtype, int(bound))


def test_ranks_may_open_a_new_store_at_the_same_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plainly = feature_store.write_atomically

    def slowly(path: Path, text: str) -> None:
        time.sleep(0.05)
        plainly(path, text)

    monkeypatch.setattr(feature_store, "write_atomically", slowly)
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: opened(tmp_path, tower=1), range(8)))
    assert len({store.folder for store in stores}) == 1
    assert json.loads((stores[0].folder / "about.json").read_text()) == {"tower": 1}


def held(store: FeatureStore, *numbers: int) -> torch.Tensor:
    places = [store.find(key) for key in keys(*numbers)]
    assert min(places) >= 0
    return store.read(np.array(places))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_one_object_puts_another_finds(tmp_path: Path, dtype: torch.dtype) -> None:
    writer, reader = opened(tmp_path, dtype=dtype), opened(tmp_path, dtype=dtype)
    assert writer.put(keys(1, 2, 1), values(1, 2, 1, dtype=dtype)) == 2
    assert reader.find(keys(1)[0]) == -1
    reader.refresh()
    assert torch.equal(held(reader, 2, 1, 2), values(2, 1, 2, dtype=dtype))
    assert reader.put(keys(2, 3), values(2, 3, dtype=dtype)) == 1  # only what is new
    writer.refresh()
    assert torch.equal(held(writer, 3, 1), values(3, 1, dtype=dtype))
    assert (writer.folder / "features.bin").stat().st_size == 3 * 15 * dtype.itemsize


def test_stores_of_other_encoders_or_dtypes_are_others(tmp_path: Path) -> None:
    opened(tmp_path, weights="a").put(keys(1), values(1))
    assert len(opened(tmp_path, weights="a")) == 1
    assert len(opened(tmp_path, weights="b")) == 0
    assert len(opened(tmp_path, weights="a", dtype=torch.bfloat16)) == 0
    assert len(list(tmp_path.glob("*/about.json"))) == 3


def test_half_an_entry_and_half_the_features_are_never_read(tmp_path: Path) -> None:
    """What a kill leaves between the two writes, and what a power failure leaves after them."""
    store = opened(tmp_path)
    store.put(keys(1, 2), values(1, 2))
    index, features_file = store.folder / "index.bin", store.folder / "features.bin"
    with open(index, "ab") as file:
        file.write(b"half an entry")
    with open(features_file, "ab") as file:
        file.write(b"features that no entry names")
    after = opened(tmp_path)
    assert torch.equal(held(after, 1, 2), values(1, 2))
    assert after.put(keys(3), values(3)) == 1
    assert index.stat().st_size == 3 * ENTRY.size
    assert torch.equal(held(opened(tmp_path), 1, 2, 3), values(1, 2, 3))
    os.truncate(features_file, 60 + 30)  # the entries reached the disk, half of what they name did not
    after = opened(tmp_path)
    assert [after.find(key) for key in keys(1, 2, 3)] == [0, -1, -1]
    assert after.put(keys(1, 2, 3), values(1, 2, 3)) == 2  # mended in their places
    assert torch.equal(held(opened(tmp_path), 1, 2, 3), values(1, 2, 3))
    assert index.stat().st_size == 3 * ENTRY.size


def test_damage_in_features_or_index_is_no_hit(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.put(keys(1, 2, 3), values(1, 2, 3))
    with open(store.folder / "features.bin", "r+b") as file:
        file.seek(60 + 7)
        file.write(b"\x55")
    with open(store.folder / "index.bin", "r+b") as file:
        file.seek(2 * ENTRY.size + 1)
        file.write(b"\x55")
    damaged = opened(tmp_path)
    assert [damaged.find(key) for key in keys(1, 2, 3)] == [0, -1, -1]
    assert damaged.find(b"\x00\x55" + keys(3)[0][2:]) == -1  # the picture that the damaged entry now seems to be of


def test_the_bound_is_that_of_all_stores_together(tmp_path: Path) -> None:
    entry = 60 + ENTRY.size
    first, second = (opened(tmp_path, 5 * entry, name=name) for name in ("first", "second"))
    assert first.put(keys(1, 2, 3), values(1, 2, 3)) == 3
    assert not first.full
    assert second.put(keys(1, 2, 3), values(1, 2, 3)) == 2
    assert "engine.feature_cache_gb" in second.full
    assert torch.equal(held(second, 1, 2), values(1, 2))
    assert second.find(keys(3)[0]) == -1
    assert opened(tmp_path, 6 * entry, name="second").put(keys(3), values(3)) == 1  # a higher bound goes on


def test_what_must_stay_free_on_the_disk_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_store, "SPARE_DISK", 1 << 62)
    store = opened(tmp_path)
    assert store.put(keys(1), values(1)) == 0
    assert "free on the disk" in store.full


def test_a_folder_that_cannot_be_written_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"engine\.feature_cache_gb=0"):
        opened(tmp_path / "file")


def _write_many(folder: str, seed: int, together: Any) -> None:
    store = opened(Path(folder))
    together.wait()
    for start in np.random.default_rng(seed).permutation(20):
        numbers = range(5 * int(start), 5 * int(start) + 10)
        store.put(keys(*numbers), values(*numbers))


def test_a_put_waits_for_the_writer_before_it_and_goes_on_behind_what_that_one_wrote(tmp_path: Path) -> None:
    ours, theirs = opened(tmp_path), opened(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        with theirs._lock():
            waiting = pool.submit(ours.put, keys(2, 3), values(2, 3))
            time.sleep(0.3)
            assert not waiting.done()
            theirs._write(keys(1)[0], values(1).view(torch.uint8).numpy().tobytes(), 0)
        assert waiting.result() == 2
    assert torch.equal(held(opened(tmp_path), 1, 2, 3), values(1, 2, 3))


def test_processes_write_together(tmp_path: Path) -> None:
    context = get_context("fork")
    together = context.Barrier(3)
    writers = [context.Process(target=_write_many, args=(str(tmp_path), seed, together)) for seed in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    store = opened(tmp_path)
    assert len(store) == 105  # each once
    assert torch.equal(held(store, *range(105)), values(*range(105)))


WRITER = """
import sys
from pathlib import Path
from tests.test_feature_cache import keys, opened, values
store = opened(Path(sys.argv[1]))
print("begun", flush=True)
for number in range(10**6):
    store.put(keys(number, number + 1), values(number, number + 1))
"""


def test_a_writer_that_is_killed_leaves_a_whole_store(tmp_path: Path) -> None:
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        index = opened(tmp_path).folder / "index.bin"
        before, deadline = index.stat().st_size, time.time() + 60
        while index.stat().st_size < before + 200 * ENTRY.size and time.time() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        store = opened(tmp_path)
        count = len(store)
        assert count >= 200
        assert torch.equal(held(store, *range(count)), values(*range(count)))
        store.put(keys(10**7), values(7))
        assert torch.equal(held(opened(tmp_path), 10**7), values(7))
        for name in ("index.bin", "features.bin"):
            (store.folder / name).unlink()


# --------------------------------------------------------------------------------------------------------------- the encoder


def frozen(home: Path, seed: int = 0, keep: bool = True, **engine: Any) -> FrozenEncoder:
    return FrozenEncoder(tiny_model(seed).image_encoder, EngineConfig(**engine), torch.device("cpu"), keep=keep)


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def asked(*numbers: int) -> dict[str, Any]:
    return {"places": np.full(len(numbers), -1), "keys": np.frombuffer(b"".join(keys(*numbers)), np.uint8).reshape(-1, 16)}


def test_features_do_not_depend_on_the_batch(home: Path) -> None:
    encoder, images = frozen(home, keep=False), noise(21)
    whole = encoder(images)
    assert torch.equal(whole, torch.cat([encoder(images[i : i + 1]) for i in range(21)]))
    assert torch.equal(whole.flip(0), encoder(images.flip(0)))
    assert whole.is_contiguous()
    torch.testing.assert_close(whole, encoder.encoder(images))
    assert len(encoder(images[:0])) == 0


def test_an_encoder_that_mixes_its_batch_gets_pictures_one_by_one(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Mixing(type(tiny_model().image_encoder)):  # type: ignore[misc]
        def patches(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().patches(pixels) + pixels[-1].mean()

    model = tiny_model()
    model.image_encoder.__class__ = Mixing
    encoder = FrozenEncoder(model.image_encoder, EngineConfig(), torch.device("cpu"), keep=False)
    assert encoder.group == 1
    assert "one by one" in capsys.readouterr().out
    images = noise(3)
    assert torch.equal(encoder(images).flip(0), encoder(images.flip(0)))


def test_dropout_is_off_in_a_frozen_encoder(home: Path) -> None:
    model = tiny_model()
    for module in model.image_encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    encoder = FrozenEncoder(model.image_encoder, EngineConfig(), torch.device("cpu"), keep=False)
    assert torch.equal(encoder(noise(3)), encoder(noise(3)))


def test_hits_and_misses_come_in_their_order(home: Path) -> None:
    """Kept, found only now, computed: whatever the mixture, the features are those of an encoder that keeps nothing."""
    images, plain = noise(6), frozen(home, keep=False)
    expected = plain(images)
    first = frozen(home)
    assert torch.equal(first(images[:3], **asked(0, 1, 2)), expected[:3])
    assert first.keep() == ""
    assert (first.hits, first.misses) == (0, 3)
    second = frozen(home)
    assert second.store is not None
    asking = asked(5, 1, 3, 0, 2, 4)
    asking["places"][1] = second.store.find(keys(1)[0])  # the worker knew this one
    asked_for = images[[5, 3, 0, 2, 4]]  # 0 and 2 have come since
    assert torch.equal(second(asked_for, **asking), expected[[5, 1, 3, 0, 2, 4]])
    assert (second.hits, second.misses) == (3, 3)
    second.keep()
    assert torch.equal(first(images, **asked(*range(6))), expected)
    assert (first.hits, first.misses) == (6, 3)


def test_what_decides_the_bits_decides_the_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def store(**changes: Any) -> Path:
        found = frozen(home, **changes).store
        assert found is not None
        return found.folder

    assert store() == store()
    assert len({store(), store(seed=1), store(kernels="plain"), store(compile="inductor")}) == 4
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        other = store()
    finally:
        torch.set_num_threads(threads)
    assert other != store()
    before, wide = store(), features.whole_width_in_use()
    monkeypatch.setattr(features, "whole_width_in_use", lambda: not wide)
    assert store() != before  # other sums in MKL's products


def test_zero_3_by_deepspeeds_own_configuration_is_noticed() -> None:
    assert features.shared_out(EngineConfig(zero_stage=3))
    assert features.shared_out(EngineConfig(deepspeed={"zero_optimization": {"stage": 3}}))
    assert not features.shared_out(EngineConfig(zero_stage=2, deepspeed={"zero_optimization": {"overlap_comm": True}}))
    assert not features.shared_out(EngineConfig(zero_stage=3, deepspeed={"zero_optimization": {"stage": 1}}))


def test_the_bound_must_be_a_size_and_is_in_no_hash() -> None:
    def config(*more: str) -> TrainConfig:
        return compose("train", TrainConfig, [*TRAIN_OVERRIDES, *FROZEN, *more])

    assert config().hash("") == config("engine.feature_cache_gb=0").hash("")
    with pytest.raises(UserError, match=r"engine\.feature_cache_gb=-1"):
        config("engine.feature_cache_gb=-1")


# ----------------------------------------------------------------------------------------------------------------- the plan


def test_a_plan_pays_a_frozen_encoder_once(corpus: Path) -> None:
    from ablations.suites import calibrate, cost

    def config(*more: str) -> TrainConfig:
        return compose("train", TrainConfig, [*TRAIN_OVERRIDES, f"data.corpus={corpus}", *more])

    pictures = 32 + sum(2 + i % 3 for i in range(12))
    first, off, full = config(*FROZEN), config(*FROZEN, "engine.feature_cache_gb=0"), config()
    plan = cost.cost_of(first)
    assert cost.encoded_images(first, first=True) == pictures < plan.images
    assert cost.encoded_images(first, first=False) == 0
    assert cost.encoded_images(off, first=False) == plan.images
    assert cost.encoded_images(full, first=False) == plan.images
    size = 16 * 16 * 4
    half = config(*FROZEN, f"engine.feature_cache_gb={pictures * size / 2e9:.12f}")
    assert cost.encoded_images(half, first=False) == pytest.approx(plan.images / 2, rel=1e-3)
    # FLOPs are the method's, whatever is kept; executed ones are not
    assert plan.flops == cost.cost_of(off).flops == cost.cost_of(off).executed_flops
    saved = (plan.images - pictures) * cost.parts_of(first).encoder_flops
    assert plan.executed_flops == pytest.approx(plan.flops - saved)
    rates, paid = {"seconds_per_flop": 3.0, "warm_seconds_per_flop": 1.0}, set[str]()
    assert calibrate._rate(first, rates, paid) == pytest.approx(1 + 2 * pictures / plan.images)
    assert calibrate._rate(config(*FROZEN, "connector=attnpool"), rates, paid) == 1.0  # the same tower: paid for
    other = config(*FROZEN, "image_encoder.image_size=32")
    assert calibrate._rate(other, rates, paid) > 1.0
    assert calibrate._rate(full, {"seconds_per_flop": 3.0}, paid) == 3.0


def test_calibration_times_a_frozen_encoder_with_and_without_its_work(corpus: Path) -> None:
    from ablations.suites import calibrate

    def config(*more: str) -> TrainConfig:
        return compose("train", TrainConfig, [*TRAIN_OVERRIDES, f"data.corpus={corpus}", *more])

    timed = calibrate.time_steps(config(*FROZEN), 1)
    assert timed["warm_seconds_per_flop"] > 0
    assert "warm_seconds_per_flop" not in calibrate.time_steps(config(), 1)
    keyed = [calibrate.describe(config(*more), 1, 1) for more in (FROZEN, (*FROZEN, "engine.feature_cache_gb=0"))]
    assert keyed[0] != keyed[1]
