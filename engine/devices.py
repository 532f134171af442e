"""How many engines, and on which device each of them runs. Loads no torch and starts no driver."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from backend.interface import StartFailed
from config import DeviceSettings, PoolSettings

logger = logging.getLogger(__name__)

# A process of its own: a driver, once started, keeps memory on each GPU until its process ends.
PROBE = """
import ctypes
count, error = ctypes.c_int(), 100
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    pass
else:
    error = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
print(count.value, error)
"""
PROBE_TIMEOUT_S = 60.0  # a driver that nobody uses takes long to wake
NO_ERROR = (0, 100)  # 100: CUDA_ERROR_NO_DEVICE, which is no fault of the driver


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """Where one engine runs."""

    index: int
    device: str  # "cuda:1", "cpu", or what DEVICE says where nothing had to be shared out
    environment: Mapping[str, str]  # set for its process, over ours


def count_cuda_devices() -> int:
    """The CUDA devices that CUDA_VISIBLE_DEVICES leaves; 0 where there is no driver.

    Raises StartFailed when the driver gives no answer.
    """
    command = [sys.executable, "-I", "-c", PROBE]
    try:
        done = subprocess.run(
            command, capture_output=True, check=True, text=True, timeout=PROBE_TIMEOUT_S
        )
    except subprocess.SubprocessError as error:
        raise StartFailed(
            "the CUDA driver does not say which devices there are "
            f"({type(error).__name__}): look at nvidia-smi, or set DEVICE=cpu"
        ) from None
    count, code = map(int, done.stdout.split())
    if code not in NO_ERROR:
        logger.warning("the CUDA driver does not start (CUresult %d): no device is counted", code)
    return count


def plan_replicas(
    pool: PoolSettings,
    device: DeviceSettings,
    impl: str,
    count_gpus: Callable[[], int] = count_cuda_devices,
) -> list[ReplicaPlan]:
    """A plan for each engine. Blocks until the driver has counted its devices, where it matters.

    Raises StartFailed when more engines are asked for than there are devices for them.
    """
    wanted, name = pool.replicas, device.device
    if wanted == 1 or (wanted == "auto" and not pool.multi_device):
        return [ReplicaPlan(0, name, {})]
    on_cpu = impl == "fake" or name == "cpu"
    devices = 0 if on_cpu else 1 if name == "mps" else count_gpus()
    count = max(1, devices) if wanted == "auto" else wanted
    if wanted == "auto":
        how = "one for each GPU" if devices else "without a GPU"
        logger.info("REPLICAS=auto: %d, %s", count, how)
    if count == 1:
        return [ReplicaPlan(0, name, {})]
    if on_cpu or (name == "auto" and not devices):
        return _share_machine(count, device)
    if count > devices:
        raise StartFailed(
            f"REPLICAS={count} but the devices of DEVICE={name} are {devices}: each replica needs "
            "one of its own; lower REPLICAS, or set DEVICE=cpu"
        )
    return _share_gpus(count, devices)


def _share_gpus(count: int, devices: int) -> list[ReplicaPlan]:
    """Replica i gets the i-th device that we see, an index or a UUID."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    entries = visible.split(",") if visible else [str(index) for index in range(devices)]
    names = [entry.strip() for entry in entries[:count]]
    return [
        ReplicaPlan(index, f"cuda:{name}", {"CUDA_VISIBLE_DEVICES": name})
        for index, name in enumerate(names)
    ]


def _share_machine(count: int, device: DeviceSettings) -> list[ReplicaPlan]:
    """Each replica gets its share of the memory for pages, and of the threads unless
    OMP_NUM_THREADS says how many.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // count))
    environment = {
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": threads,
        "MEMORY_FRACTION": str(device.memory_fraction / count),
    }
    return [ReplicaPlan(index, "cpu", environment) for index in range(count)]


def available_cores() -> int:
    """The cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
