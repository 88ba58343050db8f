"""From a checkpoint on disk, through a table, to a model that gives the same logits."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MemoryTable, causal_lm, text_config
from transformers import Qwen4ExpForCausalLM
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen4_exp

import engram
from engram.checkpoint import open_checkpoint
from engram.errors import ModelError, RowIntegrityError, SpecMismatchError
from engram.integrations.transformers import load_offloaded, offload
from engram.service.server import Server
from engram.service.sockets import parse_address
from engram.spec import NgramSpec
from engram.ssd import SsdTier
from engram.store.writer import build_table

IDS = torch.randint(8, 512, (2, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, **options):
    return model(IDS, **options).logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    causal_lm(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stored(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "table"
    schema, source = open_checkpoint(checkpoint, NgramSpec.from_pretrained(checkpoint))
    build_table(path, schema, source)
    return path


def compare(found, wanted):
    assert torch.equal(logits(found), logits(wanted))
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    assert torch.equal(logits(found, attention_mask=mask), logits(wanted, attention_mask=mask))
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(found.generate(IDS, **options), wanted.generate(IDS, **options))


@pytest.mark.parametrize("guard", [False, True], ids=["pread", "map"])
def test_from_a_checkpoint_through_a_table_to_the_same_model(checkpoint, stored, guard):
    resident = Qwen4ExpForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    assert resident.dtype == torch.bfloat16
    with engram.open(stored, guard=guard) as table:
        compare(offload(copy.deepcopy(resident), table), resident)
        compare(load_offloaded(checkpoint, table, dtype="auto"), resident)
        assert table.stats()["lookups_failed"] == 0


def test_from_a_checkpoint_through_a_sidecar_to_the_same_model(checkpoint, stored):
    resident = Qwen4ExpForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    tier = SsdTier(stored)
    server = Server({"tiny": tier}, (parse_address("tcp:127.0.0.1:0"),))
    server.start()
    try:
        address = server.addresses[0]
        with engram.connect(f"{address.host}:{address.port}", "tiny") as table:
            compare(offload(copy.deepcopy(resident), table), resident)
    finally:
        server.stop()
        tier.close()


def test_a_damaged_row_is_named_and_the_model_goes_on(checkpoint, stored):
    resident = Qwen4ExpForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    with engram.open(stored) as table:
        model = offload(copy.deepcopy(resident), table)
        lookup = table._tier.lookup

        def damaged(*arguments):
            raise RowIntegrityError.of({2: [5]}, table.name)

        table._tier.lookup = damaged
        with pytest.raises(RowIntegrityError, match="layer 2 rows 5"):
            logits(model)
        table._tier.lookup = lookup
        assert torch.equal(logits(model), logits(resident))


def test_loading_never_reads_the_tables(checkpoint, stored, tmp_path):
    resident = Qwen4ExpForCausalLM.from_pretrained(checkpoint).eval()
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if "ple_embedding" not in name}
    assert len(rest) < len(tensors)
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with engram.open(stored) as table:
        model, notes = load_offloaded(
            tmp_path, table, dtype=torch.float32, output_loading_info=True
        )
        assert not notes["missing_keys"]
        assert not notes["unexpected_keys"]
        assert type(model) is Qwen4ExpForCausalLM
        assert torch.equal(logits(model), logits(resident.float()))
        text_model = load_offloaded(checkpoint, table, model_class=qwen4_exp.Qwen4ExpTextModel)
        assert type(text_model) is qwen4_exp.Qwen4ExpTextModel


def test_loading_refuses_what_does_not_fit(checkpoint, tmp_path):
    other = MemoryTable.of_model(causal_lm(ngram_vocab_size_base=900))
    with pytest.raises(SpecMismatchError, match="layers"):
        load_offloaded(checkpoint, other)
    config = text_config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="pass model_class"):
        load_offloaded(tmp_path, other)
