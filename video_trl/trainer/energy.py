"""Energy that a machine has used, as its own counters say."""

import re
from pathlib import Path


RAPL = Path("/sys/class/powercap")


class EnergyMeter:
    """
    Adds up the energy counters of NVIDIA GPUs and of Intel and AMD processor packages, where they can be read.

    It counts whole devices of this machine, other programs on them included, and neither memory nor cooling: a lower
    bound where the machine is one's own.

    Args:
        rapl (`Path`): Folder of the processors' counters.
    """

    def __init__(self, rapl: Path = RAPL) -> None:
        self._rapl = rapl
        self._last: dict[str, float] = {}
        self.joules: float | None = None
        self.devices: list[str] = []

    def start(self) -> None:
        """Begin to count, adding to what was counted before."""
        self._last = self._read()
        self.devices = sorted(self._last)
        if self._last and self.joules is None:
            self.joules = 0.0

    def update(self) -> None:
        """Add what was used since the last call; to be called every few minutes, as a processor's counter wraps."""
        now = self._read()
        for name, value in now.items():
            used = value - self._last.get(name, value)
            if used < 0:
                used += self._range(name)
            self.joules = (self.joules or 0.0) + max(used, 0.0)
        self._last = now

    def _read(self) -> dict[str, float]:
        """Joules by device, from some moment on."""
        return self._read_processors() | _read_gpus()

    def _read_processors(self) -> dict[str, float]:
        found = {}
        for zone in sorted(self._rapl.glob("intel-rapl:*")) if self._rapl.is_dir() else []:
            if re.fullmatch(r"intel-rapl:\d+", zone.name):  # a package; its parts are counted in it
                try:
                    found[zone.name] = int((zone / "energy_uj").read_text()) / 1e6
                except (OSError, ValueError):  # readable by root only, on most systems
                    continue
        return found

    def _range(self, name: str) -> float:
        """How far a counter goes before it starts anew."""
        try:
            return int((self._rapl / name / "max_energy_range_uj").read_text()) / 1e6
        except (OSError, ValueError):
            return 0.0


def _read_gpus() -> dict[str, float]:
    try:
        import pynvml
    except ImportError:  # comes with some builds of torch
        return {}
    found = {}
    try:
        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            found[f"gpu:{number}"] = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except pynvml.NVMLError:  # no driver, or a GPU without that counter
        return {}
    return found
