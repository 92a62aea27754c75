"""How much energy a training takes, as codecarbon estimates it from the machine's meters or, without any, its load."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from types import TracebackType
from typing import Any

from compressm.errors import ConfigError, MissingExtraError

_SUMS = ("kwh", "cpu_kwh", "gpu_kwh", "ram_kwh", "co2_kg", "steps")


class Energy:
    """A context in which codecarbon watches the whole machine; it calls no service.

    Args:
        country: three-letter code, for the carbon dioxide of a kilowatt hour there; None watches nothing.

    Raises:
        MissingExtraError: codecarbon is not installed.
        ConfigError: a country that it does not know.
    """

    def __init__(self, country: str | None) -> None:
        self.country = country
        self._before: Mapping[str, Any] = {}
        self._first = 0
        self._tracker: Any = None
        self._reading: Any = None
        if country is None:
            return
        try:
            import pycountry  # comes with codecarbon
            from codecarbon import OfflineEmissionsTracker
            from codecarbon.output_methods.base_output import BaseOutput
        except ImportError as error:
            raise MissingExtraError('run.energy needs codecarbon: pip install "compressm[energy]"') from error
        if pycountry.countries.get(alpha_3=country) is None:
            raise ConfigError(f"run.energy = {country!r}: no country has this code; CHE, DEU or USA are examples")

        def keep(output: Any, total: Any, delta: Any) -> None:
            self._reading = total

        reading = type("Reading", (BaseOutput,), {"out": keep})  # only its outputs are told what the tracker measured
        self._tracker = OfflineEmissionsTracker(
            country_iso_code=country, save_to_file=False, log_level="error", output_handlers=[reading()]
        )

    def resume(self, before: Mapping[str, Any] | None, step: int) -> None:
        """Count on from what a checkpoint says.

        Args:
            before: what `used` said then; None where nothing had been watched.
            step: of the checkpoint.
        """
        self._before, self._first = before or {}, step

    def __enter__(self) -> Energy:
        if self._tracker is not None:
            self._tracker.start()
        return self

    def used(self, step: int) -> dict[str, Any] | None:
        """What the run has used by now. If a process is killed, what it used since its last checkpoint is not counted.

        Args:
            step: that the training has reached.

        Returns:
            ``kwh`` of processors, memory and together, ``co2_kg``, ``steps``: those in which it was watched, and what
            it was estimated with; None where nothing was watched.
        """
        if self._tracker is not None:
            self._tracker.flush()
        if self._reading is None:  # not watched in this process, or codecarbon could not measure
            return dict(self._before) or None
        now = {
            "kwh": self._reading.energy_consumed,
            "cpu_kwh": self._reading.cpu_energy,
            "gpu_kwh": self._reading.gpu_energy,
            "ram_kwh": self._reading.ram_energy,
            "co2_kg": self._reading.emissions,
            "steps": step - self._first,
        }
        return {
            **{name: now[name] + self._before.get(name, 0) for name in _SUMS},
            "country": self.country,
            "estimated_by": f"codecarbon {version('codecarbon')}, whole machine",
        }

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracker is not None:
            self._tracker.stop()


__all__ = ["Energy"]
