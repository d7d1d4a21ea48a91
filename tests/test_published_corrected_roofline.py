"""Corrected roofline: the reference's worked figures to 6 digits, and the 99-run plan."""

from __future__ import annotations

import io

import jax
import numpy as np
import pandas as pd
import pytest
import yaml

from dse.catalog.models import model, to_architecture
from dse.errors import InputError, UnsupportedModel
from dse.published import corrected_roofline as cr
from dse.published import workloads
from dse.published.tables import published

H100 = cr.Peak(flops=989.5e12, bandwidth=3.35e12)
US = 1e-6
# model, tp, prefill (requests, tokens), decode (requests, context): compute, KV, static, MoE, all-reduce, us
WORKED = [
    ("Llama-3.1-8B", 1, (1, 1024), (0, 0), (14723.1218, 40.065, 4166.7593, 0, 0)),
    ("Llama-3.1-8B", 1, (0, 0), (32, 1024), (468.7871, 1283.3318, 4166.7593, 0, 0)),
    ("Llama-3.1-70B", 4, (0, 0), (32, 1024), (1128.5518, 802.0824, 10216.5733, 0, 25.0406)),
    ("Mixtral-8x7B", 2, (0, 0), (32, 1024), (416.6964, 641.6659, 400.6499, 13461.8378, 5.0081)),
    ("Mixtral-8x7B", 2, (0, 0), (1, 1024), (13.0218, 20.0521, 400.6499, 3365.4594, 0.1565)),
]


def table() -> pd.DataFrame:
    rows = [
        {
            "model": name,
            "tp": tp,
            "prefill_requests": pf[0],
            "prefill_tokens": pf[1],
            "decode_requests": dc[0],
            "decode_context": dc[1],
        }
        for name, tp, pf, dc, _ in WORKED
    ]
    return published("corrected-roofline", pd.DataFrame(rows))


@pytest.mark.parametrize("i", range(len(WORKED)))
def test_worked_figures_to_the_printed_digits(i: int) -> None:
    name, _, prefill, _, (compute, kv, static, moe, reduce) = WORKED[i]
    row = table().loc[i]
    phase, other = ("pf", "dc") if prefill[0] else ("dc", "pf")
    kv_digits = 3 if name == "Llama-3.1-8B" and prefill[0] else 4
    assert round(row[f"{phase}_compute_us"], 4) == compute
    assert round(row[f"{phase}_kv_us"], kv_digits) == kv
    assert row[f"{other}_compute_us"] == row[f"{other}_kv_us"] == 0
    # .1565 has but four digits; the rest agree in all that are printed
    for feature, printed in (("w_static", static), ("w_moe", moe), ("tp_allreduce", reduce)):
        assert round(row[f"{feature}_us"], 4) == printed
    assert row["step_us"] == pytest.approx(max(compute, kv) + static + moe + reduce, abs=1e-3)


def test_deepseek_figures() -> None:
    shape = cr.SHAPES["DeepSeek-V3"]
    with jax.enable_x64(True):
        parts = cr.attention_flops(shape, cr.uniform(1.0, 128.0, 0.0), 1.0)
        kv = cr.features_one(shape, 1.0, H100, cr.step_of(0.0, 0.0, 0.0, 1.0, 4096.0)).dc_kv
        assert float(cr.attention_weights(shape)) == 189_726_720
    assert float(parts["w_dkv"]) == 1_056_964_608
    assert float(parts["w_uk"]) == float(parts["w_uv"]) == float(parts["scores"]) == 2_147_483_648
    assert float(parts["w_o"]) == 30_064_771_072
    assert float(parts["rope_scores"]) == 134_217_728
    assert float(parts["w_q"]) == 2 * 128 * 51_380_224
    assert round(float(kv) / US, 3) == 85.942


def test_an_empty_step_still_reads_weights() -> None:
    shape, beta = cr.SHAPES["Mixtral-8x7B"], cr.Beta(static=2.0, moe=3.0, step=5e-6)
    f = cr.features_one(shape, 2.0, H100, cr.step_of(0.0, 0.0, 0.0, 0.0, 0.0))
    assert float(f.w_moe) / US == pytest.approx(3365.4594, rel=1e-6)  # k experts
    assert float(cr.step_time(f, beta)) == pytest.approx(float(2 * f.w_static + 3 * f.w_moe) + 5e-6)


def test_step_time_is_linear_in_the_terms() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0.3, 5, 7)
    f = cr.features_one(cr.SHAPES["DeepSeek-V3"], 8.0, H100, cr.step_of(2.0, 512.0, 100.0, 30.0, 2000.0))
    assert float(cr.step_time(f, cr.Beta(*[], **dict(zip(cr.Beta.__dataclass_fields__, values))))) == pytest.approx(
        float(sum(v * t for v, t in zip(values, cr.terms(f), strict=True)))
    )


def test_request_overhead_has_three_alphas() -> None:
    assert cr.request_overhead(cr.Alpha(arrival=1.0, request=2.0, output_token=3.0), 10.0) == 33.0


@pytest.mark.parametrize("name", ["Llama-2-7B", "Llama-3.1-70B", "CodeLlama-34B", "Mixtral-8x7B", "DeepSeek-V3"])
def test_catalogued_models_have_the_same_shape(name: str) -> None:
    found, own = cr.shape_of(to_architecture(model(name))), cr.SHAPES[name]
    assert vars(found) == vars(own)


def test_models_outside_the_method_are_refused_by_row() -> None:
    with pytest.raises(UnsupportedModel):
        cr.shape_of(to_architecture(model("Qwen3-Next-80B-A3B")))
    text = "model,decode_requests,decode_context\nQwen3-Next-80B-A3B,1,10\nQwen3-8B,1,10\nno-such-model,1,10\n"
    cases = pd.read_csv(io.StringIO(text))
    computed = published("corrected-roofline", cases, lambda name: to_architecture(model(name)))
    assert "one kind of softmax attention" in computed["reason"][0]
    assert computed["reason"][1] == ""
    assert computed["step_us"][1] > 0
    assert "unknown model" in computed["reason"][2]
    assert all("unknown model" in reason for reason in published("corrected-roofline", cases)["reason"])


def test_a_model_given_by_columns() -> None:
    columns = {k: v for k, v in vars(cr.SHAPES["Mixtral-8x7B"]).items() if k not in ("weight_bytes", "kv_bytes")}
    case = pd.DataFrame([{"tp": 2, "decode_requests": 32, "decode_context": 1024, **columns}])
    assert published("corrected-roofline", case)["w_moe_us"][0] == pytest.approx(13461.8378, rel=1e-6)
    refused = published("corrected-roofline", case.assign(hidden=np.nan, peak_tflops=-1))
    assert refused["reason"][0] == "hidden: is empty (required)"


def test_batched_is_looped_and_gradients_are_finite() -> None:
    with jax.enable_x64(True):
        shapes = jax.tree.map(lambda *leaves: np.array(leaves, float), *cr.SHAPES.values())
        n = len(cr.SHAPES)
        spread = jax.tree.map(
            lambda v: np.full(n, float(v)), (H100, cr.step_of(1.0, 64.0, 8.0, 30.0, 2000.0), cr.Beta())
        )
        features, seconds = cr.evaluate(shapes, np.full(n, 2.0), *spread)
        for i, shape in enumerate(cr.SHAPES.values()):
            f = cr.features_one(shape, 2.0, H100, cr.step_of(1.0, 64.0, 8.0, 30.0, 2000.0))
            assert float(cr.step_time(f, cr.Beta())) == pytest.approx(float(seconds[i]), rel=1e-12)
            assert float(f.w_moe) == pytest.approx(float(features.w_moe[i]), rel=1e-12)
        whole = jax.grad(lambda s, t, p, x, b: cr.step_time(cr.features_one(s, t, p, x), b), argnums=(0, 1, 2, 3, 4))
        floats = jax.tree.map(
            float, (cr.SHAPES["DeepSeek-V3"], 8.0, H100, cr.step_of(0.0, 0.0, 0.0, 0.0, 0.0), cr.Beta())
        )
        assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(whole(*floats)))


# ------------------------------------------------------------------------------------------------ the plan


def test_the_plan_has_99_runs() -> None:
    runs = workloads.plan()
    training = [run for run in runs if run.role == "training"]
    assert len(runs) == len({run.name for run in runs}) == 99
    assert len(training) == 6 * 15
    assert {run.server.model.split("/")[1].split("-")[0] for run in runs if run.role == "validation"} == {
        "CodeLlama",
        "Llama",
        "Mixtral",
    }
    assert {run.server.tp for run in training} == {1, 2, 4}


def test_workload_profiles() -> None:
    kinds = [(w.name, w.isl, w.osl, w.rate) for w in workloads.TRAINING]
    assert [(isl, osl) for name, isl, osl, _ in kinds if name == "W1"] == [(n, 1) for n in (128, 1024, 4096, 8192)]
    assert [(isl, osl) for name, isl, osl, _ in kinds if name == "W2"] == [(n, 512) for n in (128, 1024, 4096, 8192)]
    assert [rate for name, isl, osl, rate in kinds if name == "W3" and isl == osl == 256] == [1, 8, 32, 64, 128]
    assert [k[1:] for k in kinds if k[0] == "W4"] == [(1024, 4, 128), (64, 1024, 32)]
    assert {(w.isl, w.osl) for w in workloads.VALIDATION} == {(1024, 512)}


def test_configurations_are_inference_perfs() -> None:
    for run in workloads.plan():
        read = yaml.safe_load(workloads.as_yaml(run))
        assert {"load", "data", "api", "server"} <= set(read)
        assert read["server"]["ignore_eos"] is True
        assert read["load"]["stages"][0]["duration"] == 120
        lengths = read["data"]["output_distribution"]
        assert lengths["min"] == lengths["max"] == run.workload.osl
        assert lengths["total_count"] >= run.workload.rate * 120


def test_a_missing_column_makes_the_file_unusable() -> None:
    with pytest.raises(InputError, match="column seq_len missing"):
        published("shallowsim-prefill", pd.DataFrame({"gpu": ["H200"]}))
    with pytest.raises(InputError, match="unknown method 'shallowsim' "):
        published("shallowsim", pd.DataFrame())
