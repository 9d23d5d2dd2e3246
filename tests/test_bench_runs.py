"""Runs of the benchmark that are cut short, go on, meet a limit or fail in part."""

from __future__ import annotations

import itertools
import json
import os
import sys

import pytest
import torch
from bench_command import OPTIONS, measured, only_reference, run

from fused_elbo import bench, cli
from fused_elbo.bench import checking, clock, command, cpu_clock, environment, items, measure, peers, work
from fused_elbo.bench.items import Item

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [Item("nll", data=(8, size)) for size in (8, 9, 10)]


@pytest.fixture
def small(monkeypatch):
    """Three items that the specification alone is measured at."""
    only_reference(monkeypatch)
    measured(monkeypatch, *SMALL)


def names(content):
    return [item["name"] for item in content["items"]]


@pytest.mark.usefixtures("small")
def test_ctrl_c_keeps_what_is_measured_and_resume_goes_on(tmp_path, monkeypatch, capsys):
    right = measure.measure
    turns = itertools.count()

    def interrupted(*args, **options):
        if next(turns) == 1:
            raise KeyboardInterrupt
        return right(*args, **options)

    monkeypatch.setattr(measure, "measure", interrupted)
    code, first = run(tmp_path)
    assert (code, names(first)) == (130, ["nll 8x8"])
    assert "nll 8x8" in capsys.readouterr().out
    code, second = run(tmp_path, "--resume")
    assert (code, names(second)) == (0, ["nll 8x8", "nll 8x9", "nll 8x10"])
    assert second["items"][0] == first["items"][0]
    assert second["copy"] == first["copy"]
    assert len(second["conditions"]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["times.json"]


@pytest.mark.usefixtures("small")
def test_resume_does_not_mix_machines(tmp_path, capsys):
    run(tmp_path, "--filter", "8x8")
    path = tmp_path / "times.json"
    stored = json.loads(path.read_text())
    stored["environment"] |= {"torch": "2.0.0", "cpu": "an abacus"}
    path.write_text(json.dumps(stored))
    code, content = run(tmp_path, "--resume")
    assert (code, content) == (2, stored)
    said = capsys.readouterr().err
    assert "--resume" in said
    assert f"torch 2.0.0, here {torch.__version__}" in said
    assert "cpu an abacus, here" in said


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("content", [None, "no json", "{}", '{"schema": 1}'])
def test_resume_takes_a_record(tmp_path, capsys, content):
    path = tmp_path / "times.json"
    if content is not None:
        path.write_text(content)
    assert cli.main([*OPTIONS, "--resume", "--json", str(path)]) == 2
    assert "times.json" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_what_the_time_was_over_for_is_skipped_and_resumed(tmp_path, capsys):
    code, content = run(tmp_path, "--minutes", "0")
    assert code == 0
    assert ["0 minutes were over" in item["skipped"] for item in content["items"]] == [True] * 3
    assert "Skipped: nll 8x9, float32" in capsys.readouterr().out
    code, content = run(tmp_path, "--resume")
    assert ["skipped" in item for item in content["items"]] == [False] * 3


@pytest.mark.usefixtures("small")
def test_what_does_not_fit_is_skipped(tmp_path, monkeypatch):
    needed = SMALL[1].working_set(4)
    monkeypatch.setattr(cpu_clock.CpuClock, "free_bytes", lambda self: needed / command.MEMORY_SHARE + 1)
    _, content = run(tmp_path)
    assert ["skipped" in item for item in content["items"]] == [False, False, True]
    assert "of memory" in content["items"][2]["skipped"]


@pytest.mark.usefixtures("small")
def test_inputs_that_cannot_be_had_are_skipped(tmp_path, monkeypatch):
    right = work.draw

    def draw(item, *rest):
        if item is SMALL[1]:
            raise MemoryError("no room")
        return right(item, *rest)

    monkeypatch.setattr(work, "draw", draw)
    code, content = run(tmp_path)
    assert code == 0
    assert [item.get("skipped") for item in content["items"]] == [None, "no inputs: MemoryError: no room", None]


def test_an_item_fits_into_its_estimate():
    """Of what plain PyTorch allocates at once, inputs included."""
    device, none = cpu_clock.CpuClock(cold=False), {}
    for stage, packed in itertools.product(work.STAGES, (False, True)):
        if stage == "bandwidth":
            continue
        both = not stage.startswith(("latent", "nll"))
        item = Item(stage, *((64, 1000) if both or stage == "nll" else (), (64, 600) if stage != "nll" else ()), packed)
        inputs = work.draw(item, torch.float32, device.device)
        for peer in peers.peers(item, torch.float32, device.device, ["reference"], none):
            if peer.kind == "eager":
                used = device.peak_bytes(peer.bind(inputs)) + inputs.bytes
                assert 0.4 < used / item.working_set(4) <= 1, (item.name, peer.name)


def test_peak_memory_is_counted():
    a = torch.ones(1000)
    device = cpu_clock.CpuClock(cold=False)
    assert device.peak_bytes(lambda: (a + a) * (a * a)) == 4 * 3000
    assert device.peak_bytes(lambda: (a + a).mul_(a)) == 4 * 1000


@pytest.mark.usefixtures("small")
def test_a_peer_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    def fails(x_hat, x):
        raise MemoryError("no room\nfor that")

    stage = work.STAGES["nll"]
    monkeypatch.setitem(work.STAGES, "nll", stage._replace(distributions=fails))
    code, content = run(tmp_path)
    assert code == 0
    for item in content["items"]:
        assert item["peers"]["torch.distributions"]["refused"] == "MemoryError: no room"
        assert item["rows"][0]["ratios"][0] > 0


def test_a_peer_that_fails_later_is_refused_too():
    turns = itertools.count()

    def run():
        if next(turns) == 30:
            raise RuntimeError("worn out")
        return (torch.zeros(()),)

    peer = peers.Peer("weak", "eager", lambda inputs: run, lambda inputs, found: None)
    strong = peer._replace(name="strong", bind=lambda inputs: lambda: (torch.zeros(()),))
    results = measure.measure([peer, strong], inputs(), lambda seed: inputs(), cpu_clock.CpuClock(cold=False), 0.01, {})
    assert results["weak"].summary()["refused"] == "RuntimeError: worn out"
    assert results["strong"].summary()["median_ms"] > 0


@pytest.mark.parametrize("one_by_one", [False, True])
def test_peers_take_turns_or_are_timed_one_by_one(one_by_one, monkeypatch):
    called = []

    def peer(name: str) -> peers.Peer:
        def run():
            called.append(name)
            return (torch.zeros(()),)

        return peers.Peer(name, "eager", lambda inputs: run, lambda inputs, found: None)

    rounds = measure._rounds
    begun = []
    monkeypatch.setattr(measure, "_rounds", lambda *args: (begun.append(len(called)), rounds(*args)))
    clock = cpu_clock.CpuClock(cold=False)
    results = measure.measure(
        [peer("a"), peer("b")], inputs(), lambda seed: inputs(), clock, 0.05, {}, one_set=True, one_by_one=one_by_one
    )
    assert all(result.summary()["rounds"] >= measure.LEAST_ROUNDS for result in results.values())
    changes = sum(a != b for a, b in itertools.pairwise(called[begun[0] :]))
    assert changes == 1 if one_by_one else changes > 1
    assert len(begun) == (2 if one_by_one else 1)


def inputs(size: int = 8) -> work.Inputs:
    return work.draw(Item("nll", data=(1, size)), torch.float32, torch.device("cpu"))


@pytest.mark.usefixtures("small")
def test_a_mode_that_compiles_for_too_long_is_not_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "MOST_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(peers, "modes", lambda kind, quick: {"slow": {"backend": "eager"}})
    code, content = run(tmp_path, compiled=True)
    assert code == 0
    first, *others = (item["peers"]["mse_loss, slow"] for item in content["items"])
    assert first["median_ms"] > 0
    longest = f"{first['first_call_seconds']:.1f} s (mse_loss, slow at nll 8x8)"
    assert f"s in all, the longest {longest}" in capsys.readouterr().out
    assert all("its first call at an earlier item took" in peer["left_out"] for peer in others)


@pytest.mark.usefixtures("small")
def test_a_call_that_takes_too_long_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "MOST_CALL_SECONDS", 0.0)
    code, content = run(tmp_path, "--filter", "8x8")
    assert code == 0
    assert all("left_out" in peer for peer in content["items"][0]["peers"].values())


@pytest.mark.usefixtures("small")
def test_who_is_about_as_quick_takes_as_many_calls():
    turns = [measure.Turn(None, measure.Result("", "", calls=3), None, passes) for passes in (1, 2, 16)]
    measure.level(turns)
    assert [(turn.passes, turn.result.calls) for turn in turns] == [(2, 6), (2, 6), (16, 48)]


def test_an_item_that_takes_too_long_is_cut_short(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "MOST_ITEM_SECONDS", 0.0)
    code, content = run(tmp_path, "--filter", "8x8")
    assert code == 0
    assert {peer["left_out"] for peer in content["items"][0]["peers"].values()} == {"the item's 0 s were over"}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_specification_is_left_out_where_it_would_take_long(device_type):
    most = peers.SPECIFICATION_ELEMENTS[device_type]
    large, small = (Item("nll", data=(1, count)) for count in (most + 1, most))
    found = [list(peers.left_out(item, device_type, ["native", "reference"], ())) for item in (large, small)]
    assert found == [["reference"], []]


def test_inductor_switches_are_those_of_this_torch():
    on_gpu = peers.modes("cuda", quick=False)
    assert set(on_gpu["switches"]["options"]) <= set(torch._inductor.list_options())
    assert on_gpu["switches"]["options"]["triton.cooperative_reductions"] is True
    assert "switches" not in peers.modes("cpu", quick=False)
    assert list(peers.modes("cuda", quick=True)) == ["compiled"]


@pytest.mark.parametrize(
    ("state", "set_bytes", "cache_bytes", "sets"),
    [
        ("hot", 10, 100, 1),
        ("cold", 10, 100, 31),
        ("cold", 300, 100, 2),
        ("cold", 301, 100, 1),
        ("cold", 1, 100, clock.MOST_SETS),
    ],
)
def test_cold_inputs_are_more_than_three_caches(state, set_bytes, cache_bytes, sets):
    assert clock.sets_of(state, set_bytes, cache_bytes) == sets
    assert state == "hot" or sets == clock.MOST_SETS or sets * set_bytes > 3 * cache_bytes


@pytest.mark.usefixtures("small")
def test_cold_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_clock, "_largest_cache", lambda: 1024)
    code, content = run(tmp_path, "--cold", "--filter", "8x8")
    assert code == 0
    (item,) = content["items"]
    hot, cold = (item["peers"][name] for name in ("mse_loss", "mse_loss, cold"))
    set_bytes = inputs(64).bytes
    assert (hot["state"], hot["sets"], cold["state"], cold["sets"]) == ("hot", 1, "cold", 3 * 1024 // set_bytes + 1)
    by_state = {(row["state"], row["upstream"]): row for row in item["rows"]}
    # An upstream gradient that was not foreseen is met in the first state alone.
    assert list(by_state) == [("hot", 1), ("cold", 1), ("hot", work.UPSTREAMS[1])]
    assert by_state["cold", 1]["ratio_to"]["mse_loss, cold"] == cold["median_ms"] / by_state["cold", 1]["ms"]["ours"]


def test_threads_and_processors_are_given_back(tmp_path, monkeypatch):
    only_reference(monkeypatch)
    seen = []
    measured(monkeypatch, SMALL[0])
    monkeypatch.setattr(measure, "measure", lambda *_, **__: seen.append((torch.get_num_threads(), cpu_clock.affinity())) or {})
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(2)
    run(tmp_path, "--pin")
    assert seen == [(1, sorted(before[1])[:1])]
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (2, before[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--filter", "no such item"), "latent 128x20 (MNIST)"),
        (("--threads", "0"), "--threads: got 0"),
        (("--json", "/no/such/folder/file"), "there is no folder /no/such/folder"),
        (("--resume",), "--resume: takes --json"),
        (("--budget", "nan"), "--budget: got nan, takes a positive number"),
        (("--minutes", "-1"), "--minutes: got -1"),
        (("--json", "/"), "--json: got /, takes a file"),
        (("--plot", __file__), "takes a folder: File exists"),
    ],
)
def test_bad_arguments(capsys, options, said):
    assert cli.main([*OPTIONS, *options]) == 2
    assert said in capsys.readouterr().err


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.delitem(sys.modules, "fused_elbo.bench.command")
    monkeypatch.delattr(bench, "command")
    assert cli.main([*OPTIONS, "--list"]) == 2
    said = capsys.readouterr().err
    assert "tqdm" in said
    assert "fused-elbo[bench]" in said


def test_list(capsys):
    assert cli.main([*OPTIONS, "--list", "--filter", "latent"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "latent 8x8"
    assert "both 16x3x512x512 16x8x64x64 (latent diffusion)" in listed
    assert all("latent" in line for line in listed)


def test_every_model_and_stage_has_an_item():
    on_gpu, everything = ({(i.stage, i.model) for i in items.items("cuda", everything=more)} for more in (False, True))
    for stage in work.STAGES:
        if stage != "bandwidth":
            assert {(stage, model) for model in items.MODELS} <= everything
            assert stage.startswith(("latent ", "classic")) or {(stage, model) for model in items.MODELS} <= on_gpu
    assert {("classic", "MNIST"), ("step", "mlp"), ("step", "conv")} <= on_gpu < everything
    on_cpu = [item.name for item in items.items("cpu")]
    assert len(set(on_cpu)) == len(on_cpu)
    assert set(items.TARGETS) <= set(on_cpu)
    assert set(on_cpu) < {item.name for item in items.items("cpu", everything=True)}
    assert max(max(item.elements) for item in items.items("cuda")) == 2**30


def test_a_part_that_is_wrong_is_found_wherever_it_is(monkeypatch):
    monkeypatch.setitem(checking.CHUNK, "cpu", 16)
    item = Item("both", (7, 5), (7, 3))
    drawn = work.draw(item, torch.float32, torch.device("cpu"))
    (peer,) = (
        p for p in peers.peers(item, torch.float32, torch.device("cpu"), [], {}) if p.kind == "eager" and p.upstream == 1
    )
    found = peer.bind(drawn)()
    assert peer.fault(drawn, found) is None
    for index in range(len(found)):
        wrong = [t.detach().clone() for t in found]
        wrong[index].view(-1)[-1] += 0.01 * found[index].abs().max()
        assert peer.fault(drawn, wrong) is not None
        assert "has shape" in peer.fault(drawn, [t[None] if i == index else t for i, t in enumerate(found)])


def test_the_environment_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "a/b/c.py"))
    facts = environment.facts([], torch.device("cpu"), {"native": None})
    assert facts["commit"] is facts["uncommitted_changes"] is None
    assert facts["backends"] == {"native": "timed"}
    assert not environment.differences(facts, facts)
