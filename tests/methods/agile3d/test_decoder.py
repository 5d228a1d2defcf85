"""The decoder: what must be equal is, whatever the order of objects, tokens and scenes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lamella.methods.agile3d.clicks import Click
from lamella.methods.agile3d.decoder import ClickDecoder, EncodedScene, best, elsewhere, time
from lamella.methods.agile3d.modules import NANO, ClickSegmenter, SparseUNet, UNetWidths
from lamella.methods.agile3d.scene import ClickScene, Tokens

CLICKS = (Click(2, 5), Click(1, 40), Click(3, 77), Click(0, 90), Click(1, 12), Click(2, 61))


def scene(seed: int, points: int = 400) -> ClickScene:
    drawn = np.random.default_rng(seed)
    return ClickScene(drawn.uniform(0, 2, (points, 3)).astype(np.float32), drawn.random((points, 3)).astype(np.float32))


def segmenter(shared: bool = False, layers: int = 3) -> ClickSegmenter:
    torch.manual_seed(0)
    decoder = ClickDecoder(3, 48, 4, 128, layers=layers, background=6, shared=shared)
    return ClickSegmenter(SparseUNet(NANO, voxel=0.12), decoder).eval()


@pytest.fixture(scope="module")
def model() -> ClickSegmenter:
    return segmenter()


@pytest.fixture(scope="module")
def tokens(model: ClickSegmenter) -> Tokens:
    return model.tokenise(scene(0))


@torch.no_grad()
def decoded(model: ClickSegmenter, tokens: Tokens, clicks: tuple[Click, ...] = CLICKS) -> list[Tensor]:
    return model.decode(model.encode([tokens])[0], clicks)


def test_decoding_what_was_kept_is_encoding_anew(model: ClickSegmenter, tokens: Tokens) -> None:
    kept = model.encode([tokens])[0]
    for clicks in (CLICKS[:2], CLICKS):
        for ours, again in zip(model.decode(kept, clicks), decoded(model, tokens, clicks), strict=True):
            torch.testing.assert_close(ours, again, atol=1e-6, rtol=0)


def test_other_numbers_for_objects_are_other_columns(model: ClickSegmenter, tokens: Tokens) -> None:
    number = {0: 0, 1: 3, 2: 1, 3: 2}
    theirs = decoded(model, tokens, tuple(Click(number[label], token) for label, token in CLICKS))
    for ours, renamed in zip(decoded(model, tokens), theirs, strict=True):
        torch.testing.assert_close(ours, renamed[:, [0, 3, 1, 2]], atol=1e-4, rtol=0)


def test_another_order_of_tokens_is_another_order_of_rows(model: ClickSegmenter, tokens: Tokens) -> None:
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))
    index = order.argsort()
    moved = Tokens(tokens.scene, tokens.cells[order], tokens.kept[order], index[tokens.of_point])
    theirs = decoded(model, moved, tuple(Click(label, int(index[token])) for label, token in CLICKS))
    for ours, permuted in zip(decoded(model, tokens), theirs, strict=True):
        torch.testing.assert_close(ours[order], permuted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_scenes_in_one_pass_are_encoded_as_each_alone(model: ClickSegmenter) -> None:
    scenes = [model.tokenise(scene(seed, points)) for seed, points in ((1, 300), (2, 500), (3, 50))]
    for together, each in zip(model.encode(scenes), scenes, strict=True):
        alone = model.encode([each])[0]
        torch.testing.assert_close(together.f, alone.f, atol=1e-6, rtol=0)
        torch.testing.assert_close(together.p, alone.p, atol=0, rtol=0)


def test_without_attention_a_clicked_token_gets_its_own_label() -> None:
    decoder = ClickDecoder(3, 16, 2, 32, layers=1, background=2)
    layer = decoder.layers[0]
    with torch.no_grad():
        for part in (layer.click_to_scene.out_proj, layer.click_to_click.out_proj, layer.scene_to_click.out_proj):
            part.weight.zero_()
        for linear in (layer.feedforward[2], decoder.mask[0], decoder.mask[2]):
            linear.bias.zero_()
        layer.feedforward[2].weight.zero_()
        for linear in (decoder.mask[0], decoder.mask[2]):
            linear.weight.copy_(torch.eye(16))
        decoder.background.weight.zero_()
    features = torch.eye(16)  # all tokens unlike one another
    clicks = (Click(1, 3), Click(2, 7), Click(0, 11))
    logits = decoder(EncodedScene(features, torch.zeros(16, 16)), clicks)[-1]
    assert [int(logits[token].argmax()) for _, token in clicks] == [1, 2, 0]


def test_a_clicked_token_carries_the_label_of_its_click(model: ClickSegmenter, tokens: Tokens) -> None:
    with torch.no_grad():
        kept = model.encode([tokens])[0]
    labels = model.labels(kept, CLICKS)
    assert [int(labels[token]) for _, token in CLICKS] == [label for label, _ in CLICKS]
    assert int(model.labels(kept, (*CLICKS, Click(3, CLICKS[0].token)))[CLICKS[0].token]) == 3  # the later one counts
    assert not model.labels(kept, ()).any()


def test_queries_stand_by_object_then_the_learned_ones_then_the_background(
    model: ClickSegmenter, tokens: Tokens
) -> None:
    kept = EncodedScene(torch.randn(len(tokens), 48), torch.zeros(len(tokens), 48))
    q, e, label = model.decoder.queries(kept, CLICKS)
    assert label.tolist() == [1, 1, 2, 2, 3, *[0] * 6, 0]
    clicked = [0, 1, 2, 3, 4, 11]
    torch.testing.assert_close(q[clicked], kept.f[[40, 12, 5, 61, 77, 90]])
    torch.testing.assert_close(e[clicked], time(torch.tensor([1, 4, 0, 5, 2, 3]), 48))
    torch.testing.assert_close(e[5:11], model.decoder.background_place.weight)


def test_a_label_has_its_best_query_and_none_without_one() -> None:
    Z, label = torch.tensor([[1.0, 5, -2, 0.5], [3, 2, 7, 0.25]]), torch.tensor([1, 1, 3, 0])
    inf = math.inf
    assert best(Z, label).tolist() == [[0.5, 5, -inf, -2], [0.25, 3, -inf, 7]]


def test_a_query_sees_what_its_label_has_won_and_all_where_it_has_won_nothing() -> None:
    logits = torch.tensor([[0.0, 1, -1], [2, 0, -1], [0, 3, 2]])  # won by 1, 0 and 1
    blocked = elsewhere(logits, torch.tensor([1, 0, 2]))
    assert blocked.tolist() == [[False, True, False], [True, False, True], [False, False, False]]


def test_time_is_the_sinusoid_table_and_has_no_end() -> None:
    def table(t: int, d: int) -> list[float]:
        return [f(t / 10_000 ** (2 * i / d)) for i in range(d // 2) for f in (math.sin, math.cos)]

    t = [0, 1, 7, 199, 350]
    torch.testing.assert_close(
        time(torch.tensor(t), 12), torch.tensor([table(each, 12) for each in t]), atol=1e-4, rtol=0
    )


def test_places_are_waves_of_normalised_coordinates_even_in_a_flat_scene(model: ClickSegmenter) -> None:
    coords = torch.tensor([[2.0, 5, 1], [4, 5, 2], [3, 5, 5]])
    unit = torch.tensor([[0.0, 0, 0], [1, 0, 0.25], [0.5, 0, 1]])
    angles = 2 * math.pi * unit @ model.decoder.place.G
    torch.testing.assert_close(model.decoder.place(coords), torch.cat([angles.sin(), angles.cos()], dim=1))


def test_one_layer_may_run_as_often_as_asked_and_a_prefix_is_a_prefix(model: ClickSegmenter, tokens: Tokens) -> None:
    looped = segmenter(shared=True)
    kept = looped.encode([tokens])[0]
    five = looped.decode(kept, CLICKS, 5)
    assert len(five) == 5
    torch.testing.assert_close(five[2], looped.decode(kept, CLICKS)[-1])
    torch.testing.assert_close(model.decode(kept, CLICKS, 1)[0], model.decode(kept, CLICKS)[0])


def test_the_gradient_reaches_the_encoder_through_clicked_tokens(tokens: Tokens) -> None:
    model = segmenter()
    kept = model.encode([tokens])[0]
    for part in model.decode(kept.detached(), CLICKS):
        assert not torch.autograd.grad(part.sum(), kept.f, allow_unused=True, retain_graph=True)[0]
    model.decode(kept, CLICKS)[-1].logsumexp(dim=1).sum().backward()
    weight = model.encoder.stem.conv.weight.grad
    assert weight is not None and weight.abs().sum() > 0


def test_the_papers_network_has_the_papers_levels() -> None:
    unet = SparseUNet(UNetWidths())
    assert unet.channels == 96
    blocks = [len(level.blocks) for level in (*unet.down, *unet.up)]
    assert blocks == [2, 3, 4, 6, 2, 2, 2, 2]
    joined = [level.blocks[0].first.conv.weight.shape[1:] for level in unet.up]
    assert joined == [(256 + 128, 256), (128 + 64, 128), (96 + 32, 96), (96 + 32, 96)]
