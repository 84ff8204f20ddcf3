"""The GPUs that a run is planned for: `--gpus=8x80GiB`, `--gpus=4xA100`, `--gpus=4090`."""

import re
from dataclasses import dataclass

from expo.errors import ConfigError
from expo.learner.flops import PEAK_FLOPS

MOST_GPUS = 100_000
MOST_GIB = 10_000


@dataclass(frozen=True)
class GpuKind:
    """A GPU as it is sold; memory_gib: about what PyTorch reports as its total memory; bandwidth: bytes per second."""

    name: str
    memory_gib: float
    bandwidth: float

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 products, FLOP/s."""
        return PEAK_FLOPS[self.name]


# bandwidth from the vendors' data sheets; of the memory sold, drivers keep a part
KINDS = {
    kind.name.lower(): kind
    for kind in (
        GpuKind("A100", 79.2, 2.039e12),  # SXM, 80 GB; A100-40GB names the smaller one
        GpuKind("A40", 44.5, 0.696e12),
        GpuKind("A30", 23.5, 0.933e12),
        GpuKind("A10", 22.1, 0.6e12),
        GpuKind("H100", 79.1, 3.35e12),
        GpuKind("H200", 139.8, 4.8e12),
        GpuKind("B200", 178.0, 8.0e12),
        GpuKind("L40S", 44.4, 0.864e12),
        GpuKind("L40", 44.4, 0.864e12),
        GpuKind("L4", 22.0, 0.3e12),
        GpuKind("RTX 4090", 23.5, 1.008e12),
        GpuKind("RTX 3090", 23.6, 0.936e12),
        GpuKind("MI300X", 191.5, 5.3e12),
    )
}
ALIASES = {"4090": "rtx 4090", "rtx4090": "rtx 4090", "3090": "rtx 3090", "rtx3090": "rtx 3090"}
SIZED = re.compile(r"(?P<name>.+?)[-_ ](?P<size>\d+(?:\.\d+)?)(?:gib|gb|g)")
SPEC = re.compile(r"(?:(?P<count>\d{1,6})\s*x\s*)?(?P<kind>.{1,40})")
SIZE = re.compile(r"(?P<size>\d{1,6}(?:\.\d{1,6})?)\s*(?:gib|gb|g)")


@dataclass(frozen=True)
class Gpus:
    """Some equal GPUs; kind is None if only their memory is known."""

    count: int
    memory_gib: float
    kind: GpuKind | None = None


def parse_gpus(text: str) -> Gpus:
    """The GPUs of `--gpus`: [COUNTx]MEMORY, as in 8x80GiB, or [COUNTx]NAME, as in 8xH100, L4 or A100-40GB.

    Raises: ConfigError if the text has another form, or the name is unknown.
    """
    lowered = text.strip().lower()
    found = SPEC.fullmatch(lowered)
    size = SIZE.fullmatch(found["kind"]) if found else None
    if found is None:
        raise _wrong(text)
    count = int(found["count"] or 1)
    if size:
        memory, kind = float(size["size"]), None
    else:
        name, memory_given = _split_size(found["kind"])
        kind = KINDS.get(ALIASES.get(name, name))
        if kind is None:
            raise _wrong(text)
        memory = memory_given or kind.memory_gib
    if not (1 <= count <= MOST_GPUS and 0 < memory <= MOST_GIB):
        raise _wrong(text)
    return Gpus(count, memory, kind)


def _split_size(kind: str) -> tuple[str, float | None]:
    sized = SIZED.fullmatch(kind)
    return (sized["name"], float(sized["size"])) if sized else (kind, None)


def _wrong(text: str) -> ConfigError:
    names = ", ".join(kind.name.removeprefix("RTX ") for kind in KINDS.values())
    return ConfigError(
        f"--gpus={text[:40]} is not understood; expected their number and memory or name, as in 1x24GiB, 8x80GiB or "
        f"8xH100; the known names are {names}"
    )


def kind_named(device_name: str) -> GpuKind | None:
    """The kind of a GPU by its name in `torch.cuda.get_device_name()`; None if it is not in the table."""
    for name, kind in sorted(KINDS.items(), key=lambda item: -len(item[0])):
        if re.search(rf"(?<!\w){name}(?!\w)", device_name, flags=re.IGNORECASE):
            return kind
    return None
