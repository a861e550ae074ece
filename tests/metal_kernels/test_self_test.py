"""A kernel is used once its self-test passed on this machine, else rejected in one line."""

import json
import platform
import plistlib
from dataclasses import dataclass

import mlx.core as mx
import pytest
from fixtures.attention_cases import Ragged

from internvl3_mlx import device
from internvl3_mlx.errors import UserError
from internvl3_mlx.metal_kernels import dispatch, registry, self_test
from internvl3_mlx.metal_kernels.flash_decode import (
    FlashVariant,
    attend_fastest,
    attend_mlx,
    flash_decode,
    prefers_row_layout,
    should_use_kernel,
)
from internvl3_mlx.metal_kernels.flash_reference import flash_decode_reference
from internvl3_mlx.metal_kernels.kv_append import KVAppendVariant
from internvl3_mlx.metal_kernels.kv_layout import KVRowLayout
from internvl3_mlx.metal_kernels.self_test_inputs import SELF_TEST_RUNS
from internvl3_mlx.metal_kernels.variants import all_variants

FAST = {"schedules": ("forward",), "checked": False}
SMALL = FlashVariant(mx.float16, 4, 32, 32, 3)
NEW = KVAppendVariant(KVRowLayout(32, 4, 32, mx.float16))
REFUSED = ("constexpr int ACROSS = 4;", "constexpr int ACROSS = four;")
WRONG = ("float whole = total[m] * fade;", "float whole = total[m] * 2.0f * fade;")


@pytest.fixture
def lines(a_mac):
    reported = []
    dispatch.set_fallback_handler(reported.append)
    yield reported
    dispatch.set_fallback_handler()


@dataclass
class Odd:
    """A kernel whose self-test calls ``during``."""

    during: object
    name: str = "odd"
    dtype: mx.Dtype = mx.float32
    fallback: str = "MLX"

    def self_test_pairs(self):
        self.during()
        return [(mx.ones(3), mx.ones(3))]


@pytest.mark.parametrize("variant", [SMALL, NEW], ids=lambda variant: variant.name)
def test_a_correct_kernel_passes_its_self_test(emulated, lines, variant):
    with emulated(**FAST):
        assert self_test.is_usable(variant)
    assert lines == []
    assert self_test.all_results()[0].name == variant.name
    assert self_test.all_results()[0].detail.startswith("relative error")


@pytest.mark.parametrize(
    ("change", "reported"),
    [(REFUSED, "failed on this machine (flash_rows"), (WRONG, "is wrong on this machine")],
)
def test_a_broken_kernel_is_reported_once_and_the_answer_is_the_same(
    emulated, lines, change, reported
):
    q, store = Ragged((9, 5), 3, 32, 4).made(mx.float16)
    store = store.first_tokens(5)
    with emulated(mutate=[change], **FAST):
        found = [flash_decode(q, store, 5)[0] for _ in range(3)]
    assert all(mx.array_equal(out, flash_decode_reference(q, store, 5)[0]) for out in found)
    assert len(lines) == 1
    assert lines[0].startswith(f"Metal kernel {SMALL.name} {reported}")
    assert lines[0].endswith(
        "falling back to MLX's own attention. Run `internvl3 doctor` for details"
    )
    assert "\n" not in lines[0]


def test_a_self_test_runs_the_source_that_an_answer_uses(emulated, lines, monkeypatch):
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "force")
    q, store = Ragged((9, 9), 3, 32, 4).made(mx.float16)
    with emulated(**FAST) as metal:
        attend_fastest(q, store, 9)
    *tried, answer, answer_join = metal.dispatches
    assert {one.text for one in tried} == {answer.text, answer_join.text}
    assert len(tried) == 2 * len(SELF_TEST_RUNS)
    splits = {one.grid[1] for one in tried if one.kernel == answer.kernel}
    assert min(splits) >= 3  # which the second kernel joins


def test_the_first_compiler_error_is_quoted(lines, a_mac):
    def refuse():
        raise RuntimeError(
            "[metal::Device] Unable to build metal library from source\n"
            "program_source:9:3: warning: unused\n"
            "program_source:12:3: error: use of undeclared identifier 'eight'\n  eight\n"
        )

    assert not self_test.is_usable(Odd(refuse))
    assert "(program_source:12:3: error: use of undeclared identifier 'eight'); " in lines[0]


def test_a_self_test_that_ended_the_process_is_not_repeated(lines, a_mac):
    while_trying = {}
    assert self_test.is_usable(
        Odd(lambda: while_trying.update(registry.read_record(registry.SELF_TESTS_FILE)))
    )
    self_test.results.clear()  # a start after one that ended there
    registry.write_record(registry.SELF_TESTS_FILE, while_trying)
    again = Odd(lambda: pytest.fail("it was tried again"))
    assert not self_test.is_usable(again)
    assert [state.detail for state in self_test.run_self_tests([again])] == [self_test.CRASHED]
    works = Odd(lambda: None)
    assert [state.passed for state in self_test.run_self_tests([works], retry=True)] == [True]
    assert self_test.is_usable(works)


def test_no_pair_hides_that_another_is_not_a_number(lines, a_mac):
    odd = Odd(lambda: None)
    odd.self_test_pairs = lambda: [
        (mx.ones(3), mx.ones(3)), (mx.array([1.0, float("nan")]), mx.ones(2)),
    ]  # fmt: skip
    assert not self_test.is_usable(odd)
    assert "is wrong on this machine (relative error nan)" in lines[0]


def test_an_interrupted_self_test_saves_nothing(lines, a_mac):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_test.is_usable(Odd(interrupt))
    assert registry.read_record(registry.SELF_TESTS_FILE) == {}
    assert self_test.is_usable(Odd(lambda: None))


def test_a_rejected_kernel_is_a_warning_without_a_handler(emulated, a_mac):
    with (
        pytest.warns(RuntimeWarning, match="falling back to MLX's own attention") as reported,
        emulated(mutate=[REFUSED], **FAST),
    ):
        assert not self_test.is_usable(SMALL)
    assert len(reported) == 1


def test_a_result_is_saved_for_later_processes(emulated, lines):
    with emulated(mutate=[REFUSED], **FAST):
        assert not self_test.is_usable(SMALL)
    self_test.results.clear()  # a later start
    with emulated(**FAST) as metal:
        assert not self_test.is_usable(SMALL)
    assert metal.dispatches == []
    assert len(lines) == 1


@pytest.mark.parametrize("what", ["device", "architecture", "macos", "mlx", "kernels"])
def test_another_machine_system_mlx_or_source_is_tested_again(lines, a_mac, what):
    refused = Odd(lambda: 1 / 0)
    assert not self_test.is_usable(refused)
    path = a_mac / registry.SELF_TESTS_FILE
    content = json.loads(path.read_text("utf-8"))
    content["environment"][what] = "another"
    path.write_text(json.dumps(content), "utf-8")
    self_test.results.clear()
    assert self_test.is_usable(Odd(lambda: None))


def test_the_environment_names_the_system_and_changes_with_any_source(monkeypatch, tmp_path):
    plist = tmp_path / "SystemVersion.plist"
    monkeypatch.setattr(device, "MACOS_VERSION_FILE", plist)
    macos_version = device.macos_version.__wrapped__
    assert macos_version() == platform.release()
    for damaged in (b"", b"<plist>", plistlib.dumps(["26.1"]), plistlib.dumps({})):
        plist.write_bytes(damaged)
        assert macos_version() == platform.release()
    plist.write_bytes(plistlib.dumps({"ProductVersion": "26.1", "ProductBuildVersion": "25B78"}))
    assert macos_version() == "26.1 (25B78)"

    package = tmp_path / "kernels"
    (package / "shaders").mkdir(parents=True)
    sources = [package / "flash_decode.py", package / "shaders" / "flash.metal"]
    monkeypatch.setattr(registry, "files", lambda _: package)
    digests = []
    for text in ("a", "b"):
        for source in sources:
            source.write_text(text)
            digests.append(registry.kernels_digest.__wrapped__())
    (package / "notes.txt").write_text("no part of a kernel")
    assert len({*digests}) == len(digests)
    assert registry.kernels_digest.__wrapped__() == digests[-1]


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"environment": 1}', '{"content": {"x": {"y": 1}}}']
)
def test_a_damaged_file_is_ignored(emulated, lines, a_mac, content):
    a_mac.mkdir()
    (a_mac / registry.SELF_TESTS_FILE).write_text(content, "utf-8")
    with emulated(**FAST):
        assert self_test.is_usable(SMALL)
    assert registry.read_record(registry.SELF_TESTS_FILE)[SMALL.name]["passed"] is True


def test_a_file_with_other_fields_is_ignored(lines):
    registry.write_record(registry.SELF_TESTS_FILE, {SMALL.name: {"works": 1}})
    assert self_test.load_results() == {}


def test_an_unwritable_folder_stops_nothing(emulated, lines, a_mac, monkeypatch):
    a_mac.parent.joinpath("file").write_text("")
    monkeypatch.setenv("INTERNVL3_CACHE", str(a_mac.parent / "file"))
    with emulated(**FAST):
        assert self_test.is_usable(SMALL)
    assert lines == []
    assert not registry.add_speedups(faster_from(100))
    assert registry.is_faster(SMALL.registry_key, 100)  # as long as this process lives


def test_run_self_tests_repeats_all_and_reports_nothing(emulated, lines):
    with emulated(mutate=[REFUSED], **FAST):
        assert not self_test.is_usable(SMALL)
    lines.clear()
    with emulated(**FAST):
        states = [*self_test.run_self_tests([SMALL, NEW])]
    assert [state.passed for state in states] == [True, True]
    with emulated(mutate=[WRONG], **FAST):
        assert not next(self_test.run_self_tests([SMALL])).passed
    assert lines == []
    self_test.results.clear()
    assert {state.name for state in self_test.all_results()} == {SMALL.name, NEW.name}


def test_every_published_size_has_variants():
    names = [variant.name for variant in all_variants()]
    assert len(names) == len({*names})
    for shape in (
        "head_dim 32, 3 rows",
        "head_dim 64, 4 to 8 rows",
        "head_dim 128, 2 rows",
        "head_dim 128, 9 to 16 rows",
        "head_dim 128, 25 to 32 rows",
        "head_dim 128, 121 to 128 rows",
    ):
        assert sum(shape in name for name in names) >= 3
    assert all(getattr(variant, "is_supported", True) for variant in all_variants())


def faster_from(tokens, ratio=2.0):
    return [registry.KernelSpeedup(SMALL.registry_key, tokens, ratio)]


def test_a_kernel_is_used_only_where_measured_to_be_faster(emulated, lines):
    with emulated(**FAST):
        assert not should_use_kernel(SMALL, 5000)
        assert registry.add_speedups(faster_from(100))
        used = [should_use_kernel(SMALL, tokens) for tokens in (99, 100, 5000)]
        assert used == [False, True, True]
        assert prefers_row_layout(NEW.layout, 3, 1, 100)
        assert not prefers_row_layout(NEW.layout, 7, 1, 100)
        assert not prefers_row_layout(NEW.layout, 3, 2, 100)  # of other key-value heads
        assert not should_use_kernel(SMALL.with_draft(2), 100)
        registry.add_speedups(faster_from(100, ratio=1.04))
        assert not should_use_kernel(SMALL, 5000)
        assert not registry.faster_cases()  # nothing is faster: a token costs no look


def test_the_mode_disables_kernels_or_forces_them(emulated, lines, monkeypatch):
    with emulated(**FAST) as metal:
        monkeypatch.setenv(dispatch.MODE_VARIABLE, "force")
        assert should_use_kernel(SMALL, 1)
        registry.add_speedups(faster_from(100))
        monkeypatch.setenv(dispatch.MODE_VARIABLE, "off")
        tried = len(metal.dispatches)
        assert not should_use_kernel(SMALL, 5000)
        assert not self_test.is_usable(SMALL)
        assert len(metal.dispatches) == tried
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "fast")
    with pytest.raises(
        UserError, match="INTERNVL3_KERNELS=fast is not a mode; choose from off, on, force"
    ):
        dispatch.kernel_mode()


def test_attend_fastest_gives_the_same_either_way(emulated, lines, monkeypatch):
    shape = Ragged((9, 9), 3, 32, 4)
    q, store = shape.made(mx.float16)
    with emulated(**FAST) as metal:
        built_in = attend_fastest(q, store, 9)
        assert metal.dispatches == []
        monkeypatch.setenv(dispatch.MODE_VARIABLE, "force")
        ours = attend_fastest(q, store, 9)
        assert metal.last.kernel == "flash_join"
    assert mx.array_equal(built_in, attend_mlx(q, store, 9))
    assert mx.allclose(ours, built_in, atol=2e-3)


def test_an_unsupported_shape_uses_mlx(emulated, lines, monkeypatch):
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "force")
    for shape in (Ragged((9, 9), 3, 96), Ragged((9, 9), 33, 32, draft=4)):
        q, store = shape.made()
        with emulated(**FAST) as metal:
            out = attend_fastest(q, store, 9)
            flash_decode(q, store, 9)
        assert metal.dispatches == []
        assert out.shape == q.shape


def test_without_metal_nothing_is_tested(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path))
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "force")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert not self_test.is_usable(SMALL)
    assert dispatch.device_name() == "no Metal device"
    assert [*tmp_path.iterdir()] == []
