"""Length distributions as nodes, and traces: means and variances kept, malformed files refused with their row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dse.cost import lengths as dist
from dse.cost.lengths import Lengths
from dse.errors import InputError
from dse.space.traces import read_trace

SHARED = Path(__file__).parent.parent.parent / "shared" / "traces"


def _moments(x: Lengths) -> tuple[float, float, float, float]:
    i, o = float(x.weight @ x.isl), float(x.weight @ x.osl)
    return i, float(x.weight @ x.isl**2) / i**2 - 1.0, o, float(x.weight @ x.osl**2) / o**2 - 1.0


@pytest.mark.parametrize("cvs", [(0.3, 0.0), (0.0, 0.7), (0.8, 0.5), (2.0, 1.0)])
@pytest.mark.parametrize("correlation", [-0.6, 0.0, 0.6])
def test_lognormal_keeps_means_variances_and_the_sign_of_the_correlation(
    cvs: tuple[float, float], correlation: float
) -> None:
    x = dist.lognormal(1200.0, 250.0, *cvs, correlation=correlation, prefix_hit=0.25)
    assert x.weight.sum() == pytest.approx(1.0)
    assert _moments(x) == pytest.approx((1200.0, cvs[0] ** 2, 250.0, cvs[1] ** 2), rel=1e-9, abs=1e-12)
    assert np.all(x.isl > 0)
    assert np.all(x.osl > 0)
    np.testing.assert_allclose(x.cached, 0.25 * x.isl)
    if min(cvs) > 0:
        joint = float(x.weight @ (x.isl * x.osl)) / (1200.0 * 250.0) - 1.0
        true = np.expm1(correlation * np.sqrt(np.log1p(cvs[0] ** 2) * np.log1p(cvs[1] ** 2)))
        assert joint == pytest.approx(true, rel=0.35, abs=0.02)


def test_no_variation_is_the_plain_number() -> None:
    x = dist.lognormal(1000.0, 100.0, prefix_hit=0.5)
    assert (x.isl, x.osl, x.cached, x.weight) == (1000.0, 100.0, 500.0, 1.0)


def test_third_moments_and_quantiles_of_moderate_tails() -> None:
    """What waits depend on: E[L^3] of a lognormal is (1 + cv^2)^3; percentiles lie between nodes."""
    for cv in (0.3, 0.6, 1.0):
        x = dist.lognormal(1.0, 1.0, cv, 0.0)
        assert float(x.weight @ x.isl**3) == pytest.approx((1 + cv**2) ** 3, rel=0.2)
        order = np.argsort(x.isl)
        share = np.cumsum(x.weight[order])
        sigma = np.sqrt(np.log1p(cv**2))
        p90 = np.exp(1.2815515655446004 * sigma - 0.5 * sigma**2)
        at = int(np.searchsorted(share, 0.9))
        assert x.isl[order][at - 2] < p90 < x.isl[order][min(at + 2, len(order) - 1)]


def test_empirical_nodes_of_a_skewed_joint_sample() -> None:
    rng = np.random.default_rng(0)
    z = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 20_000)
    isl, osl = np.round(np.exp(6.5 + 0.8 * z[:, 0])) + 1, np.round(np.exp(5 + 0.6 * z[:, 1])) + 1
    cached = np.floor(0.3 * isl)
    x = dist.empirical(isl, osl, cached)
    assert len(x.weight) == dist.NODES
    means = isl.mean(), (isl.std() / isl.mean()) ** 2, osl.mean(), (osl.std() / osl.mean()) ** 2
    assert _moments(x) == pytest.approx(means, rel=1e-6)
    assert float(x.weight @ (x.isl * x.osl)) == pytest.approx((isl * osl).mean(), rel=0.08)
    assert float(x.weight @ x.cached) == pytest.approx(cached.mean(), rel=0.02)
    assert np.all(x.cached <= x.isl)
    shuffled = rng.permutation(len(isl))
    again = dist.empirical(isl[shuffled], osl[shuffled], cached[shuffled])  # ties may fall to either side of a cut
    np.testing.assert_allclose(np.sort(again.isl), np.sort(x.isl), rtol=1e-2)


def test_few_requests_are_their_own_nodes_and_padding_weighs_nothing() -> None:
    x = dist.empirical(np.array([10.0, 20.0, 30.0]), np.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(x.isl, [10.0, 20.0, 30.0])
    wide = dist.padded(x, 7)
    assert len(wide.weight) == 7
    assert _moments(wide) == pytest.approx(_moments(x))


# ------------------------------------------------------------------------------------------------ traces


def _trace(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


HEAD = "arrival_s,input_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (HEAD, "has no requests"),
        ("arrival_s,input_tokens\n0,5\n", "output_tokens missing"),
        ("time,tokens\n0,5\n", "columns input_tokens, output_tokens missing (found: time, tokens)"),
        (HEAD + "0,10,5\n2,10,5\n1,10,5\n", "row 4: arrival_s 1 comes after 2"),
        (HEAD + "0,10,5\n-1,10,5\n", "row 3: arrival_s is '-1'"),
        (HEAD + "0,10,5\n1,-3,5\n", "row 3: input_tokens is '-3' (allowed: whole numbers from 1 to"),
        (HEAD + "0,10,5\n1,10,0\n", "row 3: output_tokens is '0'"),
        (HEAD + "0,10,5\n1,10,nan\n", "row 3: output_tokens is 'nan'"),
        (HEAD + "0,10,5\ninf,10,5\n", "row 3: arrival_s is 'inf'"),
        (HEAD + "0,10,5\n1,,5\n", "row 3: input_tokens is an empty cell"),
        (HEAD + "0,10,5\n\n1,10,5\n", "row 3: input_tokens is an empty cell"),
        (HEAD + "0,10,5\n1,ten,5\n", "row 3: input_tokens is 'ten'"),
        (HEAD + "0,10,5\n1,10.5,5\n", "row 3: input_tokens is '10.5'"),
        (HEAD + "0,10,5\n1,1e30,5\n", "row 3: input_tokens is '1e30'"),
        ("input_tokens,output_tokens,prefix_tokens\n10,5,11\n", "row 2: prefix_tokens 11 is more than input_tokens 10"),
        ("input_tokens,input_tokens,output_tokens\n1,2,3\n", "stands twice"),
    ],
)
def test_malformed_traces_have_one_message_with_the_row(tmp_path: Path, text: str, message: str) -> None:
    path = _trace(tmp_path, text)
    with pytest.raises(InputError) as error:
        read_trace(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_unreadable_traces(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_trace(tmp_path / "nothing.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00\x01")
    for path in (tmp_path, tmp_path / "bytes.csv"):
        with pytest.raises(InputError, match=r"cannot be read|missing"):
            read_trace(path)


def test_a_trace_is_read_whole_and_cannot_be_changed(tmp_path: Path) -> None:
    path = _trace(
        tmp_path, "x,input_tokens, output_tokens,arrival_s,ideal_prefix_hit_tokens\na,10,5,0,4\nb,20,1,1.5,0\n\n"
    )
    trace = read_trace(path)
    assert len(trace) == 2
    np.testing.assert_array_equal(trace.arrival_s, [0.0, 1.5])
    np.testing.assert_array_equal(trace.prefix_tokens, [4.0, 0.0])
    assert trace.rate == pytest.approx(1 / 1.5)
    with pytest.raises(ValueError, match="read-only"):
        trace.input_tokens[0] = 3.0
    bare = read_trace(_trace(tmp_path, "input_tokens,output_tokens\n10,5\n"))
    assert bare.arrival_s is None
    assert (bare.rate, bare.cv) == (None, None)


@pytest.mark.skipif(not SHARED.exists(), reason="published traces are not here")
def test_published_traces_are_read_and_kept_in_mean_and_variance() -> None:
    files = sorted(SHARED.glob("*.csv"))
    assert files
    for path in files:
        trace = read_trace(path)
        x = dist.empirical(trace.input_tokens, trace.output_tokens, trace.prefix_tokens)
        i, o = trace.input_tokens, trace.output_tokens
        true = i.mean(), (i.std() / i.mean()) ** 2, o.mean(), (o.std() / o.mean()) ** 2
        assert _moments(x) == pytest.approx(true, rel=1e-3), path.name
        assert (trace.arrival_s is None) == ("no_arrivals" in path.name)
