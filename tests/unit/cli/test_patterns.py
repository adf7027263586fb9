"""Tensor names summarised."""

from lora_deploy.cli.patterns import summarise_names


def test_layers_of_one_kind_become_one_pattern() -> None:
    names = [f"model.layers.{i}.mlp.{part}.weight" for i in range(12) for part in ("up", "down")]
    assert summarise_names(names) == [
        ("model.layers.*.mlp.up.weight", 12),
        ("model.layers.*.mlp.down.weight", 12),
    ]


def test_a_name_that_is_alone_keeps_its_number() -> None:
    assert summarise_names(["h.3.attn.c_attn.weight", "lm_head.weight"]) == [
        ("h.3.attn.c_attn.weight", 1),
        ("lm_head.weight", 1),
    ]


def test_experts_within_layers_are_counted_together() -> None:
    names = [f"layers.{i}.experts.{e}.w1.weight" for i in range(2) for e in range(4)]
    assert summarise_names(names) == [("layers.*.experts.*.w1.weight", 8)]


def test_digits_inside_a_word_are_not_a_number() -> None:
    assert summarise_names(["block1.weight", "block2.weight"]) == [("block1.weight", 1), ("block2.weight", 1)]
