import astropy.units as u
import numpy as np
import pytest

from galembed.errors import UnknownUnit
from galembed.photometry import ab_magnitude, nanojansky_per_count, nanojansky_per_unit


@pytest.mark.parametrize("unit", ["nJy", "uJy", "mJy", "Jy"])
def test_unit_factors_agree_with_astropy(unit: str) -> None:
    assert nanojansky_per_unit(unit) == pytest.approx(u.Unit(unit).to(u.nJy), rel=1e-12)


def test_a_nanomaggy_is_magnitude_22_5() -> None:
    assert ab_magnitude(nanojansky_per_unit("nanomaggy")) == pytest.approx(22.5, abs=1e-12)
    # 3631 Jy at magnitude 0 makes it 3631 nJy; the rounded zero point 31.4 is 6e-5 off.
    assert nanojansky_per_count(22.5) == pytest.approx(3631, rel=1e-4)


def test_flux_without_a_magnitude_gives_nan() -> None:
    assert np.isnan(ab_magnitude([-1.0, 0.0, np.nan])).all()


@pytest.mark.parametrize("unit", ["", "ADU", "electron/s", "MJy"])
def test_an_unknown_unit_is_refused(unit: str) -> None:
    with pytest.raises(UnknownUnit, match="BUNIT"):
        nanojansky_per_unit(unit)
