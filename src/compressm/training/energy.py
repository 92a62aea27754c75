"""How much energy a training takes, as codecarbon estimates it from the machine's meters or, without any, its load."""

from __future__ import annotations

from importlib.metadata import version
from types import TracebackType
from typing import Any

from compressm.errors import ConfigError, MissingExtraError


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
        self._tracker: Any = None
        if country is None:
            return
        try:
            import pycountry  # comes with codecarbon
            from codecarbon import OfflineEmissionsTracker
        except ImportError as error:
            raise MissingExtraError('run.energy needs codecarbon: pip install "compressm[energy]"') from error
        if pycountry.countries.get(alpha_3=country) is None:
            raise ConfigError(f"run.energy = {country!r}: no country has this code; CHE, DEU or USA are examples")
        self._tracker = OfflineEmissionsTracker(country_iso_code=country, save_to_file=False, log_level="error")

    def __enter__(self) -> Energy:
        if self._tracker is not None:
            self._tracker.start()
        return self

    def used(self, steps: int) -> dict[str, Any] | None:
        """Stop watching and say what was used since the start.

        Args:
            steps: training steps since then: fewer than all in a run that was resumed.

        Returns:
            ``kwh`` of processors, memory and together, ``co2_kg``, ``steps``, and what it was estimated with.
        """
        if self._tracker is None:
            return None
        carbon = self._tracker.stop()
        data = self._tracker.final_emissions_data
        return {
            "kwh": data.energy_consumed,
            "cpu_kwh": data.cpu_energy,
            "gpu_kwh": data.gpu_energy,
            "ram_kwh": data.ram_energy,
            "co2_kg": carbon,
            "country": self.country,
            "steps": steps,
            "estimated_by": f"codecarbon {version('codecarbon')}, whole machine",
        }

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracker is not None and kind is not None:
            self._tracker.stop()


__all__ = ["Energy"]
