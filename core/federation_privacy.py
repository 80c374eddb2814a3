"""The tables of federation.toml that make a claim: [privacy] and [site_privacy]."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from intramural.core.config import Section
from intramural.core.values import Count, Positive


class Privacy(Section):
    """The table [privacy]; absent, nothing is claimed."""

    unit: Literal["record", "person"]
    """what one neighbour differs in: 'record' or 'person'"""
    epsilon: Positive | None = None
    """privacy spent over the whole federation, at delta; the noise is computed from it"""
    noise_multiplier: Positive | None = None
    """noise's standard deviation / clip_norm, instead of epsilon"""
    delta: Annotated[float, Field(gt=0, lt=1, strict=True)]
    """below 1 / nominal_records (person: nominal_persons)"""
    clip_norm: Positive
    """L2 bound of one unit's gradient"""
    nominal_records: Count
    """public constant from which sample rate and divisor follow; never the private count"""
    nominal_persons: Count | None = None
    """person: as nominal_records, in persons"""
    records_per_person: Count | None = None
    """person: most records of one person used in a step; the rest are left out"""
    relation: Literal["add-remove", "replace-one"] = "add-remove"
    """neighbouring data sets: a unit added or removed, or one replaced by another"""
    engine: Literal["bookkeeping", "opacus", "opacus-ghost"] = "bookkeeping"
    """'bookkeeping' (one forward, one backward), 'opacus' as it is, or its ghost clipping for
    records, 'opacus-ghost'"""
    metrics_noise: Positive | None = None
    """noise on each evaluation's two counts / how far one unit moves them, charged; absent: sites
    send no metrics"""

    @property
    def nominal_units(self) -> int:
        """Public number of units a site is taken to hold."""
        return self.nominal_persons or self.nominal_records

    @model_validator(mode="after")
    def _is_a_plan(self) -> "Privacy":
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("set exactly one of privacy.epsilon and privacy.noise_multiplier")
        person = (self.nominal_persons, self.records_per_person)
        if self.unit == "person" and None in person:
            raise ValueError(
                "unit = 'person' needs privacy.nominal_persons and privacy.records_per_person"
            )
        if self.unit == "record" and person != (None, None):
            raise ValueError(
                "privacy.nominal_persons and privacy.records_per_person are for unit = 'person'"
            )
        if self.unit == "person" and self.engine == "opacus-ghost":
            raise ValueError(
                "privacy.engine = 'opacus-ghost' has one norm a record, none for a person; set "
                "privacy.engine to 'bookkeeping' or 'opacus'"
            )
        if self.delta >= 1 / self.nominal_units:
            name = "nominal_records" if self.unit == "record" else "nominal_persons"
            raise ValueError(f"privacy.delta must be below 1 / privacy.{name}")
        return self


class SitePrivacy(Section):
    """The table [site_privacy]; absent, no site's whole update is hidden.

    Guarantees:
        None by itself: `strategies/site_dp.py` says what holds. Sound in combination with
        strategy.weights = "equal" alone, which the federation checks: with other weights one
        site's part of the sum exceeds clip_norm.
    """

    clip_norm: Annotated[float, Field(ge=1e-6, le=1e6, strict=True)]
    """L2 bound of a site's whole update in a round"""
    noise_multiplier: Annotated[float, Field(ge=0.01, le=1e4, strict=True)]
    """noise's standard deviation on the sum of the updates / clip_norm"""
    delta: Annotated[float, Field(gt=0, lt=1, strict=True)]
    """below 1 / sites.min, and better far below"""
