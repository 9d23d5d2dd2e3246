"""``python -m fused_elbo bench``: what it says of right numbers, that it does not time wrong ones, and that it goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_command import measured, only_reference, run

from fused_elbo import reference
from fused_elbo.bench import checking, items, measure, options, peers, report, work
from fused_elbo.bench.items import Item
from fused_elbo.reference import plain
from fused_elbo.spec import Gradients

pytestmark = pytest.mark.usefixtures("one_thread")


def able() -> list[str]:
    return [name for name, reason in peers.backends("cpu").items() if reason is None]


def test_table_json_and_pictures(tmp_path, capsys):
    markdown = tmp_path / "tables.md"
    code, content = run(tmp_path, "--filter", "8X8", "--plot", str(tmp_path / "pictures"), "--markdown", str(markdown))
    assert code == 0
    direct = [f"{name}, {peers.DIRECT}" for name in able() if name != peers.SPECIFICATION]
    environment = content["environment"]
    assert [name for name, state in environment["backends"].items() if state == "timed"] == able()
    assert environment["threads"] == 1
    assert environment["torch"] == str(torch.__version__)
    assert environment["command"].startswith("python -m fused_elbo bench --device cpu --quick --threads 1 --no-compile")
    assert content["copy"]["gb_per_s"] > 0
    latent, nll = content["items"]
    third = ", upstream 0.33"
    for item, eager, suffixes in ((latent, ["classic lines"], [""]), (nll, ["mse_loss", "written out"], ["", third])):
        named = [[*able(), *direct, *eager, "torch.distributions"]] * len(suffixes)
        assert list(item["peers"]) == [name + suffix for names, suffix in zip(named, suffixes, strict=True) for name in names]
        for peer in item["peers"].values():
            low, high = peer["quartiles_ms"]
            assert 0 < low <= peer["median_ms"] <= high
            assert peer["rounds"] >= 3
            assert peer["peak_bytes"] > 0
            assert peer["upstream"] == (1 / 3 if third in peer["peer"] else 1)
        medians = {name: peer["median_ms"] for name, peer in item["peers"].items()}
        for row, name in zip(item["rows"], [n + s for s in suffixes for n in (*able(), *direct)], strict=True):
            suffix = third if third in name else ""
            assert row["backend"] == name
            assert row["ratios"] == [min(medians[e + suffix] for e in eager) / medians[name], None]
            assert row["ratio_to"]["torch.distributions" + suffix] == medians["torch.distributions" + suffix] / medians[name]
            passes = 8 if item is latent else 3
            assert row["gb_per_s"] == pytest.approx(passes * 64 * 4 / 1e6 / medians[name])
            assert row["percent_of_copy"] == pytest.approx(100 * row["gb_per_s"] / content["copy"]["gb_per_s"])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    named = [line.split("|")[1].replace(report.NOISY, "").strip() for line in lines[2:]]
    assert named == [row["item"] for item in content["items"] for row in item["rows"]]
    assert len({len(line) for line in lines}) == 1
    assert markdown.read_text() == printed
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["ratios-float32.png", "roofline-float32.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def shaped(stage: str, data: items.Shape, latents: items.Shape, packed: bool) -> Item:
    """An item with what the stage takes of these."""
    if stage in ("nll", "bandwidth"):
        return Item(stage, data)
    return Item(stage, () if stage.startswith("latent") else data, latents, packed)


@pytest.mark.parametrize("stage", work.STAGES)
@pytest.mark.parametrize(
    "shapes", [((5, 7), (5, 3), False), ((3, 2, 5, 5), (3, 2, 3, 1), True)], ids=("two tensors", "packed moments")
)
def test_everybody_is_right_in_every_dtype(monkeypatch, stage, shapes):
    """Also the second time, compiled (without Inductor, which would take long) and in several parts."""
    monkeypatch.setitem(checking.CHUNK, "cpu", 40)
    item = shaped(stage, *shapes)
    for dtype in options.DTYPES.values():
        modes = {"compiled": {"backend": "aot_eager"}} if dtype == torch.float32 and not item.packed else {}
        inputs = work.draw(item, dtype, torch.device("cpu"))
        kinds = set()
        for peer in peers.peers(item, dtype, torch.device("cpu"), able(), modes):
            kinds.add(peer.kind)
            with peers.selected(peer):
                call = peer.bind(inputs)
                assert peer.fault(inputs, call()) is None, (peer.name, dtype)
                if stage != "bandwidth":
                    assert peer.fault(inputs, call()) is None, (peer.name, dtype)
        expected = {"ours", "copy"} if stage == "bandwidth" else {"ours", "eager", "distributions", *modes}
        assert kinds == expected
    torch._dynamo.reset()


def test_bandwidth(tmp_path, capsys, monkeypatch):
    measured(monkeypatch, Item("bandwidth", data=(16, 32), targets=(85.0,)))
    code, content = run(tmp_path)
    assert code == 0
    for row in content["items"][0]["rows"]:
        assert row["ratios"] == [pytest.approx(100 * row["gb_per_s"] / row["copy_gb_per_s"])]
        assert row["gb_per_s"] == pytest.approx(3 * 16 * 32 * 4 / (1e6 * row["ms"]["ours"]))
        assert row["copy_gb_per_s"] == pytest.approx(2 * 16 * 32 * 4 / (1e6 * row["ms"]["copy"]))
    assert "% of the copy" in capsys.readouterr().out


def test_sweep_names_the_worst(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(items, "SWEEP", (64, 2048))
    code, content = run(tmp_path, "--sizes", "--filter", "sweep")
    assert code == 0
    assert [item["data"] or item["latents"] for item in content["items"]] == [[1, 64], [2, 1024]] * 2
    ratio, name = min(
        (row["ratios"][0], row["item"]) for item in content["items"] for row in item["rows"] if row["backend"] == "reference"
    )
    assert f"Worst of the sweep, reference: {ratio:.2f} x eager at {name}." in capsys.readouterr().out


def test_steps(tmp_path, capsys):
    code, content = run(tmp_path, "--filter", "step mlp")
    assert code == 0
    (item,) = content["items"]
    assert item["name"] == "step mlp 32x784"
    assert list(item["peers"]) == [*able(), "classic lines"]
    for row in item["rows"]:
        assert row["ratios"] == [item["peers"]["classic lines"]["median_ms"] / row["ms"]["ours"], None]
        assert row["gb_per_s"] is None
    assert "step mlp 32x784" in capsys.readouterr().out


def entry(dtype: str = "float32", others: float = 0.0, **ms: float) -> dict[str, Any]:
    """An item as a record has it, with the medians of peers by their kind."""
    kinds = {"native": "ours", "reference": "ours", "mse_loss": "eager", "mode": "compiled"}
    content = {"name": "nll 8x8", "dtype": dtype, "stage": "nll", "state": "hot", "sweep": False, "targets": (2.0, 3.0)}
    timed = {
        name: measure.Result(name, kinds[name], name if kinds[name] == "ours" else None, ms=[time] * 2, others=others).summary()
        for name, time in ms.items()
    }
    content |= {"ideal_bytes": 768, "left_out": {}, "peers": timed, "rows": []}
    return content | {"rows": report.rows(content, 10.0)}


def test_targets_are_for_float32_and_what_is_built_for_speed():
    times = {"native": 1.0, "reference": 9.0, "mse_loss": 2.5, "mode": 2.0}
    native, plain = entry(**times)["rows"]
    assert native["ratios"] == [2.5, 2.0]
    assert native["met"] == [True, False]
    assert not plain["targets"]
    assert not entry("float16", **times)["rows"][0]["targets"]


def test_the_headline_is_the_fastest_public_call():
    assert report.headline(entry(native=3.0, reference=2.0))["backend"] == "native"
    assert report.headline(entry(reference=2.0))["backend"] == "reference"
    assert report.headline(entry(mse_loss=2.0)) is None


def test_the_headline_of_a_step_meets_its_like():
    item = entry(native=2.0, reference=4.0, mse_loss=3.0, mode=1.5)
    compiled = {**item["peers"]["reference"], "backend": None, "median_ms": 1.0}
    item |= {"stage": "step", "ideal_bytes": None, "peers": {**item["peers"], "ours, compiled": compiled}}
    item["rows"] = report.rows(item, 10.0)
    row = report.headline(item)
    assert (row["backend"], row["ratios"]) == ("native", [1.5, 1.5])


def test_a_noisy_machine_is_said():
    quiet, noisy = (report.tables([entry(native=1.0, others=share)]) for share in (0.01, 0.2))
    assert report.NOISY not in quiet
    assert "nll 8x8, float32 (20%)" in noisy


def five_percent_off(monkeypatch):
    right = plain.gaussian_nll_backward

    def wrong(g_nll, x_hat, x, likelihood, out: Gradients, **options):
        right(g_nll, x_hat, x, likelihood, out, **options)
        out.x_hat.mul_(1.05)

    monkeypatch.setattr(plain, "gaussian_nll_backward", wrong)


def other_noise_in_the_backward(monkeypatch):
    monkeypatch.setattr(plain, "draw", lambda mu, noise: torch.randn_like(mu))


def too_much_noise(monkeypatch):
    right = plain.draw
    monkeypatch.setattr(plain, "draw", lambda mu, noise: 2 * right(mu, noise))


def not_a_number(monkeypatch):
    right = plain.kl_divergence
    monkeypatch.setattr(plain, "kl_divergence", lambda mu, logvar: right(mu, logvar) * torch.nan)


def an_error(monkeypatch):
    monkeypatch.delattr(reference, "rsample_kl")


@pytest.mark.parametrize(
    ("mistake", "item", "reason"),
    [
        (five_percent_off, "nll 8x8", "result 1 is off by 5.0e-02"),
        (other_noise_in_the_backward, "latent 8x8", "result 3 is off"),
        (too_much_noise, "latent 8x8", "the noise is not standard normal"),
        (not_a_number, "latent 8x8", "result 1 is off by nan"),
        (an_error, "latent 8x8", "AttributeError"),
    ],
)
def test_a_wrong_backend_is_not_timed(tmp_path, capsys, monkeypatch, mistake, item, reason):
    only_reference(monkeypatch)
    mistake(monkeypatch)
    code, content = run(tmp_path, "--filter", item)
    assert code == 1
    assert not content["items"][0]["rows"]
    printed = capsys.readouterr().out
    for name, peer in content["items"][0]["peers"].items():
        assert ("refused" in peer) == (peer["kind"] == "ours") != ("median_ms" in peer)
        if peer["kind"] == "ours":
            assert reason in peer["refused"]
            assert f"Refused, not timed: {item}, float32, {name}: {peer['refused']}" in printed
