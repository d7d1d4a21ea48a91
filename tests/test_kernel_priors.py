"""What tables of single kernels say of the coefficients that a serving fit shares with them."""

from pathlib import Path

import numpy as np
import pytest

from dse.calibrate import kernel_priors as module
from dse.calibrate.kernel_priors import SHARED, kernel_priors
from dse.calibrate.parameters import FREE
from dse.calibrate.read import read_files
from dse.catalog.hardware import gpu, to_device
from dse.cost.coefficients import Coefficients
from dse.cost.roofline import rates

SHARED_DATA = Path(__file__).parents[2] / "shared" / "measured"
FREE_OF = {f.name: f for f in FREE}


def test_every_shared_coefficient_is_fitted():
    assert set(SHARED) <= set(FREE_OF)


@pytest.mark.parametrize("name", ["a100", "h100", "b200"])
def test_a_share_of_the_peak_is_set_against_the_power_limit(name):
    device, into = to_device(gpu(name)), SHARED["gemm_bf16"][3]
    # The share that the defaults sustain is 1 of what the power limit leaves.
    assert into(float(rates(device, Coefficients())[0]) / float(device.peak_bf16), device) == pytest.approx(1.0)


def test_default_and_draws_meet_by_their_precision():
    free, default = FREE_OF["memory"], np.log(Coefficients().memory)
    single = module._together("memory", np.array([default + 0.2]))
    alike = module._together("memory", np.full(8, default + 0.2))
    apart = module._together("memory", np.array([default - 1.8, default + 2.2]))
    assert single[0] - default == pytest.approx(0.1)  # one GPU tells no more than the default does
    assert alike[0] - default == pytest.approx(0.2 * 8 / 9)
    assert 0 < apart[0] - default < 0.05 * (alike[0] - default)
    assert single[1] == alike[1] == apart[1] == free.spread("base")


def test_no_table_says_nothing():
    assert kernel_priors({}) == {}


def test_gemm_tables_tell_of_gemms():
    path = SHARED_DATA / "kernels" / "gemm.parquet"
    if not path.exists():
        pytest.skip("no ../shared/measured/kernels here")
    table = read_files([path]).kernels["gemm"].sample(2500, random_state=0).reset_index(drop=True)
    found = kernel_priors({"gemm": table})
    assert set(found) == {name for name, (op, *_) in SHARED.items() if op == "gemm"}
    # Five GPUs whose peaks differ sevenfold sustain nearly the same share of what their power limits leave.
    assert abs(found["gemm_bf16"][0]) < 0.15
    assert np.exp(found["memory"][0]) == pytest.approx(0.83, abs=0.05)
