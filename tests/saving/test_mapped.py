"""Checkpoints opened as pages of their files: the same model, the same cut and the same files as loaded whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import transformers

from compressm.errors import CheckpointError
from compressm.lab import one_shot_inputs
from compressm.lab.one_shot import compress_checkpoint
from compressm.runtime.paging import Pager, places_in, write_shard
from compressm.saving.mapped import blocks, open_mapped
from hf_models import FAMILIES, hf_models, tokens


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=1, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mapped_model_computes_the_same(family: str, tmp_path: Path, data: st.DataObject) -> None:
    model = data.draw(hf_models(family))
    folder = tmp_path / f"{family}{len(list(tmp_path.iterdir()))}"
    model.save_pretrained(folder)
    opened = open_mapped(folder)
    if opened is None:  # transformers stores the experts of these under other names than its classes have
        assert family in ("Jamba", "GraniteMoeHybrid", "NemotronH")
        return
    assert len(blocks(opened.model)) == model.config.num_hidden_layers
    done: list[int] = []
    with opened.released(lambda: done.append(1)):
        logits = opened.model(input_ids=tokens()).logits
    torch.testing.assert_close(logits, model(input_ids=tokens()).logits, rtol=1e-5, atol=1e-6)
    assert len(done) == model.config.num_hidden_layers


def sharded(folder: Path) -> Any:
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=256, hidden_size=16, state_size=12, num_heads=4, head_dim=8, n_groups=1, num_hidden_layers=3,
        chunk_size=16, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Mamba2ForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size="8KB")
    return model


def test_the_cut_is_that_of_the_model_in_memory_and_shards_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(tmp_path / "big")
    last = sorted((tmp_path / "big").glob("*.safetensors"))[-1]
    extra = {"mtp.norm.weight": torch.randn(5)}
    save_file({**load_file(last), **extra}, last, metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    arguments: dict[str, Any] = {"states": 5, "sequences": 4, "length": 32}
    mapped = compress_checkpoint(tmp_path / "big", tmp_path / "small", tmp_path / "text.txt", **arguments)
    monkeypatch.setattr(one_shot_inputs, "open_mapped", lambda _: None)
    whole = compress_checkpoint(tmp_path / "big", tmp_path / "whole", tmp_path / "text.txt", **arguments)

    assert mapped.carried.tensors == ("mtp.norm.weight",)
    assert mapped.loss_after == pytest.approx(whole.loss_after, rel=1e-6)
    for one, other in zip(mapped.report.layers, whole.report.layers, strict=True):
        assert one.error_on_data == pytest.approx(other.error_on_data, rel=1e-4)
        assert one.error_held_out == pytest.approx(other.error_held_out, rel=1e-4)
    names = sorted(path.name for path in (tmp_path / "big").glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "small").glob("*.safetensors")) == names
    found = {name: value for n in names for name, value in load_file(tmp_path / "small" / n).items()}
    assert torch.equal(found["mtp.norm.weight"], extra["mtp.norm.weight"])
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    small, other = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / one) for one in ("small", "whole"))
    assert small.config.state_size == 5
    torch.testing.assert_close(small(tokens()).logits, other(tokens()).logits)


def test_what_cannot_be_mapped_is_loaded_whole(tmp_path: Path) -> None:
    model = sharded(tmp_path / "mixed")
    file = sorted((tmp_path / "mixed").glob("*.safetensors"))[0]
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    assert open_mapped(tmp_path / "mixed") is None
    (tmp_path / "pickled").mkdir()
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert open_mapped(tmp_path / "pickled") is None


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"\xff" * 64, (20).to_bytes(8, "little") + b'{"a": {"dtype": 1}} ')):
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{number}.safetensors: damaged"):
            places_in(file)


@given(data=st.data())
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_written_shard_is_read_by_safetensors_and_by_the_pager(tmp_path: Path, data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    tensors = {f"t{i}": (100 * torch.rand(shape)).to(dtype) for i, shape in enumerate(shapes)}
    tensors["t0"] = tensors["t0"].transpose(0, -1) if tensors["t0"].ndim else tensors["t0"]  # not contiguous
    write_shard(file := tmp_path / "a.safetensors", tensors)
    read, pager = load_file(file), Pager()
    for name, place in places_in(file).items():
        assert torch.equal(read[name], tensors[name])
        assert torch.equal(pager.tensor(file, place), tensors[name])
    pager.release()
    assert all(torch.equal(pager.tensor(file, place), tensors[name]) for name, place in places_in(file).items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident memory from /proc")
def test_pages_that_are_let_go_of_are_not_resident(tmp_path: Path) -> None:
    write_shard(tmp_path / "big.safetensors", {f"t{i}": torch.ones(1 << 22) for i in range(8)})  # 8 times 16 MiB
    script = f"""
from pathlib import Path
from compressm.runtime.paging import Pager, layer_done, places_in
def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmRSS"].split()[0])
file, pager = Path({str(tmp_path / "big.safetensors")!r}), Pager()
before, highest = resident(), 0
with pager.active():
    for place in places_in(file).values():
        assert float(pager.tensor(file, place).sum()) == 1 << 22
        highest = max(highest, resident() - before)
        layer_done()
print(highest, resident() - before)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    highest, at_the_end = map(int, found.stdout.split())
    assert highest < 48_000  # kB, of 131,072
    assert at_the_end < 32_000


def test_the_text_is_read_as_far_as_it_is_needed(tmp_path: Path) -> None:
    class Words:
        """A tokenizer that counts what it is given."""

        longest = 0

        def __call__(self, text: str) -> dict[str, list[int]]:
            self.longest = max(self.longest, len(text))
            return {"input_ids": [len(word) for word in text.split()]}

    path, tokenizer = tmp_path / "text.txt", Words()
    path.write_text("ab cde f " * 100_000)
    first = one_shot_inputs._first_tokens(tokenizer, path, 50)
    assert first.tolist() == ([2, 3, 1] * 17)[:50]
    assert tokenizer.longest <= 400
    path.write_text("ab cde f " * 4)
    assert one_shot_inputs._first_tokens(tokenizer, path, 50).tolist() == [2, 3, 1] * 4
