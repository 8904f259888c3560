"""Syncing weights to a vLLM worker in another process, against vLLM's own in-process reload of the same tensors.

    python scripts/bench/sync.py [--repeats 7] [--bucket-mb 64] [--model FOLDER] [--transport auto] [--tiny]

Without --model: random weights of SmolLM2-135M's shape (135 M parameters, float32). In turns, in one run: A, a vLLM engine in this
process reloads the tensors with vLLM's own `reload_weights`; B, the same tensors go from this process to a vLLM engine in an
actor, with manifest, fingerprint and prefix-cache reset (`RayPool.sync`). Prints medians, the ratio B / A, and what B adds in
memory (polled): what is shared between the processes (also if it is kept between syncs) or in the object store, and the private
memory of both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ttrl.cluster import connect
from ttrl.config import load_recipe
from ttrl.model.load import load_tokenizer
from ttrl.model.weights import NamedTensors
from ttrl.rollout.engines import vllm
from ttrl.rollout.ray_pool import RayPool

SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
TINY = SMOLLM2 | {"num_hidden_layers": 2, "vocab_size": 1024}
MIB = 2**20


def random_model(folder: Path, shape: dict) -> Path:
    """Random weights with the tiny model's tokenizer: only sizes matter here."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=2, bos_token_id=1)).save_pretrained(folder)
    load_tokenizer("bundled:tiny-adder").save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


@contextmanager
def store_peak() -> Iterator[list[int]]:
    """Bytes used in the object store at most, polled every 5 ms."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    found, done = [0], threading.Event()

    def poll() -> None:
        while not done.wait(0.005):
            found[0] = max(found[0], get_memory_info_reply(state).store_stats.object_store_bytes_used)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    yield found
    done.set()
    thread.join()


def resident(pid: int, kind: str = "RssAnon") -> int:
    """Bytes of a process that are in memory now: private ones, or, with RssShmem, those it shares with others."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{kind}:"))


@contextmanager
def peaks(*watched: tuple[int, str]) -> Iterator[list[int]]:
    """Growth of each (pid, kind of memory) at most, polled every 5 ms."""
    start, found, done = [resident(*which) for which in watched], [0] * len(watched), threading.Event()

    def poll() -> None:
        while not done.wait(0.005):
            for i, which in enumerate(watched):
                found[i] = max(found[i], resident(*which) - start[i])

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    yield found
    done.set()
    thread.join()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--transport", default="auto", help="cluster.transport")
    parser.add_argument("--tiny", action="store_true", help="two layers, to see that the script works")
    call = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = call.model or random_model(Path(folder), TINY if call.tiny else SMOLLM2)
        measure(path, call.repeats, call.bucket_mb, call.transport)


def measure(path: Path, repeats: int, bucket_mb: int, transport: str) -> None:
    recipe = load_recipe(
        "quickstart",
        [
            f"model.path={path}", "cluster.backend=ray", "cluster.address=local", f"cluster.bucket_mb={bucket_mb}",
            f"cluster.transport={transport}",
            "rollout.engine.use=vllm", "rollout.engine.with.kv_cache_gib=0.25", "rollout.engine.with.max_model_len=256",
        ],
    )  # fmt: skip
    nodes = connect(recipe.cluster, lambda: None, ranks=0, device="cpu")
    try:
        pool = RayPool(recipe, nodes)
        own = vllm(recipe.model, lambda: None, kv_cache_gib=0.25, max_model_len=256)
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        manifest = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        versions = iter(range(1, 1000))

        def reload() -> None:
            own._vllm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(list(tensors.items()))})
            own._vllm.reset_prefix_cache()

        def sync() -> None:
            source = NamedTensors(next(versions), manifest, lambda: iter(tensors.items()))
            pool.sync(source, must_move=False)

        import ray

        worker = ray.get(pool._crew.handles[0].__ray_call__.remote(lambda _: os.getpid()))
        own_pid = os.getpid()
        unshared = resident(own_pid, "RssShmem")
        for work in (reload, sync):
            work()
        pairs = [(seconds(reload), seconds(sync)) for _ in range(repeats)]
        with peaks((own_pid, "RssAnon")) as alone:
            reload()
        kept = resident(own_pid, "RssShmem") - unshared
        with store_peak() as store, peaks((own_pid, "RssShmem"), (own_pid, "RssAnon"), (worker, "RssAnon")) as grown:
            sync()
    finally:
        nodes.close()
    base, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{len(tensors)} tensors, {size / MIB:.0f} MiB, buckets of {bucket_mb} MiB, {repeats} pairs, medians")
    print(f"  A  vLLM's own reload, in process    {base:.3f} s")
    print(f"  B  sync to a worker process         {ours:.3f} s")
    ratios = sorted(b / a for a, b in pairs)
    print(f"  B / A                               {ours / base:.2f}   (pairs: {ratios[0]:.2f} to {ratios[-1]:.2f})")
    crossing = max(store[0], kept + grown[0])
    print(f"  shared memory at most               {crossing / MIB:.0f} MiB = {crossing / MIB / bucket_mb:.2f} buckets")
    print(f"  private memory of sender, receiver  {grown[1] / MIB:.0f} MiB, {grown[2] / MIB:.0f} MiB above before")
    print(f"  private memory of A                 {alone[0] / MIB:.0f} MiB above before")


if __name__ == "__main__":
    main()
