"""Hardware: reports against other sources, measurements against a fake clock."""

import getpass
import platform
import socket
from pathlib import Path

import pytest
import torch

from companion import hardware
from companion.hardware import (
    MachineCard,
    Peaks,
    best_device,
    cpu_features,
    last_level_cache,
    machine_card,
    peaks,
    physical_memory,
)

LINUX = platform.system() == "Linux"
CPU = torch.device("cpu")


def test_best_device_prefers_cuda_then_mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device().type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert best_device().type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert best_device().type == "cpu"


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_features_and_memory_agree_with_the_kernel():
    words = set(Path("/proc/cpuinfo").read_text().split())
    kernel_names = {"avx512_f": "avx512f", "fma3": "fma", "neon": "asimd", "dot": "asimddp"}
    for name in {"avx2", "f16c", "avx512_f", "avx512_vnni", "fma3", "neon", "dot", "i8mm"}:
        if name in cpu_features():
            assert cpu_features()[name] == (kernel_names.get(name, name) in words), name
    total = Path("/proc/meminfo").read_text().split()[1]
    assert physical_memory() == int(total) * 1024


@pytest.mark.skipif(not LINUX, reason="reads /sys")
def test_largest_cache_is_at_least_each_cache_torch_knows():
    known = torch.cpu.get_capabilities()
    assert last_level_cache(CPU) >= max(
        known.get("l1d_cache_size", 1), known.get("l2_cache_size", 1)
    )


def test_peaks_are_measured_once_for_each_thread_count(monkeypatch):
    calls = []

    def rate(device, dtype):
        calls.append(dtype)
        if dtype == torch.float64:
            raise TypeError("no FP64 on this device")
        return 2e9

    monkeypatch.setattr(hardware, "product_rate", rate)
    monkeypatch.setattr(hardware, "read_rate", lambda device: 1e9)
    hardware._measured.cache_clear()
    try:
        first = peaks("cpu")
        assert peaks("cpu") is first and len(calls) == len(hardware.DTYPES)
        assert "float64" not in first.flops
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            assert peaks("cpu").threads == threads + 1 and len(calls) == 2 * len(hardware.DTYPES)
        finally:
            torch.set_num_threads(threads)
    finally:
        hardware._measured.cache_clear()


class Product:
    """A matrix whose product takes a given time on a fake clock."""

    clock = 0.0

    def __init__(self, width, rate):
        self.seconds = 2 * width**3 / rate

    def to(self, dtype):
        return self

    def __matmul__(self, other):
        Product.clock += self.seconds


@pytest.mark.parametrize("rate, widest", [(0.45e9, 256), (10e9, 512)])
def test_widths_grow_only_until_a_product_takes_ten_milliseconds(monkeypatch, rate, widest):
    widths = []

    def rand(width, _, device):
        widths.append(width)
        return Product(width, rate)

    monkeypatch.setattr(torch, "rand", rand)
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: Product.clock)
    assert hardware.product_rate(CPU, torch.float16) == pytest.approx(rate)
    assert max(widths) == widest


def test_best_seconds_is_the_fastest_after_the_warm_up(monkeypatch):
    pace = iter([9.0, 0.03, 0.01, 0.02, 7.0])
    now = [0.0]

    def call():
        now[0] += next(pace)

    monkeypatch.setattr(hardware.time, "perf_counter", lambda: now[0])
    assert hardware.best_seconds(call, patience=0.05) == pytest.approx(0.01)
    assert next(pace) == 7.0  # 0.06 s were enough


def test_read_rate_counts_every_byte_of_a_buffer_beyond_the_caches(monkeypatch):
    reads = []
    monkeypatch.setattr(hardware, "last_level_cache", lambda device: 65 * 2**20)

    def fake(kernel, patience):
        reads.append(kernel())
        return 0.5

    monkeypatch.setattr(hardware, "best_seconds", fake)
    rate = hardware.read_rate(CPU)
    buffer = rate * 0.5
    assert buffer >= 260 * 2**20
    product, total, dot = reads
    assert product.shape[0] * 2048 * 4 == buffer  # each row of ones sums to 2048
    assert total == buffer / 4 and dot == buffer / 8


def test_real_products_reach_a_plausible_rate():
    rate = hardware.product_rate(CPU, torch.float32)
    assert 1e7 < rate < 1e15


def test_peaks_refuse_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for call in (peaks, machine_card):
        with pytest.raises(ValueError, match="device is 'cuda:0'; known are: cpu"):
            call("cuda:0")


def test_machine_card_names_no_person_and_no_host():
    card = machine_card()
    for secret in {socket.gethostname(), platform.node(), getpass.getuser(), str(Path.home())}:
        words = str(card).replace(",", " ").split()
        assert not secret or secret not in words, secret
    assert "/" not in str(card)


def test_machine_card_renders_and_survives_json():
    card = MachineCard(
        "Chip <1>", ("avx2",), 2, 1, 8 * 2**30, "cpu", "Linux 6.1", "3.11.7", "2.13.0", "2026-01-01"
    )
    assert "8 GiB" in str(card) and "Chip &lt;1&gt;" in card._repr_html_()
    assert card.as_dict()["features"] == ["avx2"] and card.as_dict()["memory"] == 2**33
    here = machine_card("cpu")
    assert here.threads == torch.get_num_threads() and here.device == "cpu"
    assert set(here.features) <= set(hardware.FEATURES)


def test_peaks_render_every_ceiling():
    shown = Peaks("cpu", 1, {"float32": 146e9, "float16": 0.45e9}, 12.3e9)
    for text in (str(shown), shown._repr_html_()):
        assert "146 GFLOP/s" in text and "0.45 GFLOP/s" in text and "12.3 GB/s" in text
    assert shown.as_dict()["flops"]["float16"] == 0.45e9
