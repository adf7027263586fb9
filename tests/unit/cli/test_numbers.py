"""Sizes and other numbers, as typed and as printed."""

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_deploy.cli.numbers import (
    FiniteNumber,
    Flags,
    Size,
    format_number,
    format_seconds,
    format_size,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("5GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        ("5G", 5_000_000_000),
        ("2GiB", 2**31),
        ("1.5 GB", 1_500_000_000),
        ("0.1GB", 100_000_000),
        ("800MB", 800_000_000),
        ("4KiB", 4096),
        ("7kB", 7000),
        ("1TB", 10**12),
        ("4096", 4096),
        ("512B", 512),
        (" 1 MB ", 1_000_000),
    ],
)
def test_a_size_is_decimal_unless_it_says_otherwise(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5XB", "5 GB MB", "5iB", "0", "0.1", "nan", "1e9", "5GB5"])
def test_what_is_no_size_is_refused(text: str) -> None:
    assert parse_size(text) is None
    with pytest.raises(click.BadParameter, match="expected a size such as 5GB"):
        Size().convert(text, None, None)


@given(st.integers(1, 10**15))
def test_a_printed_size_can_be_typed_again_and_is_right_to_half_a_percent(n_bytes: int) -> None:
    text = format_size(n_bytes).removesuffix("ytes")
    assert parse_size(text) == pytest.approx(n_bytes, rel=0.005)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (999_600, "1.00 MB"),
        (16_060_000_000, "16.1 GB"),
        (269e6, "269 MB"),
    ],
)
def test_a_size_is_printed_with_three_digits(n_bytes: float, text: str) -> None:
    assert format_size(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10 s"), (59.7, "1 min 0 s"), (185, "3 min 5 s"), (3725, "1 h 2 min")]
)
def test_a_duration_reads_naturally(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_figure_that_does_not_exist_is_a_dash() -> None:
    assert [format_number(None), format_number(0.0), format_number(12345.6)] == ["–", "0", "1.23e+04"]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "x", ""])
def test_a_factor_must_be_finite(text: str) -> None:
    with pytest.raises(click.BadParameter, match="expected a finite number"):
        FiniteNumber().convert(text, None, None)


def test_a_factor_may_be_negative_or_zero() -> None:
    assert [FiniteNumber().convert(text, None, None) for text in ("-0.5", "0", "1e-3")] == [-0.5, 0.0, 0.001]


@pytest.mark.parametrize("text", ["T,F,T", "t, f, true", "1,0,1"])
def test_flags_are_read(text: str) -> None:
    flags = Flags().convert(text, None, None)
    assert flags == (True, False, True)


@pytest.mark.parametrize("text", ["", "T,,F", "T;F", "yes,no", "TF"])
def test_flags_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="expected T and F"):
        Flags().convert(text, None, None)
