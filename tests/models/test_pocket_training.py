"""The training forward computes what the Hugging Face model computes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "pocket"))

model = pytest.importorskip("model")
network = pytest.importorskip("network")
shards = pytest.importorskip("shards")


def test_packed_logits_equal_those_of_single_sequences() -> None:
    tokenizer = model.build_tokenizer()
    processor = model.build_processor(tokenizer)
    untrained = model.build_model(tokenizer, seed=1).eval()
    prefix = tokenizer(shards.PREFIX).input_ids
    training = network.TrainingNetwork(untrained, prefix, compile_layers=False)
    row = shards.make_row(tokenizer._tokenizer, "test", 0, 3)
    batch = {name: torch.from_numpy(array)[None] for name, array in row.items()}
    pixels = processor.image_processor(Image.fromarray(row["image"]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states, _ = training(training.vision(batch["image"]), batch)
        packed = untrained.lm_head(states)[0]
    num_questions = int(row["segment"].max())
    assert num_questions >= 3
    for segment in range(1, num_questions + 1):
        (index,) = (batch["segment"][0] == segment).nonzero(as_tuple=True)
        ids = [*prefix, *[untrained.config.image_token_id] * 144, *batch["tokens"][0][index].tolist()]
        inputs = torch.tensor([ids])
        with torch.no_grad():
            logits = untrained(input_ids=inputs, pixel_values=pixels, attention_mask=torch.ones_like(inputs)).logits[0]
        torch.testing.assert_close(packed[index], logits[len(prefix) + 144 :], atol=1e-4, rtol=0)
