"""Where the methods contain a published loss, they equal TRL's trainer for it on the same batch and model."""

import copy
import json

import pytest
import torch
from conftest import SMOKE, build_model
from datasets import Dataset
from transformers import AutoConfig
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from axolotl_mopo.logprobs.attention import use_tree_attention
from axolotl_mopo.logprobs.computer import LogProbComputer, by_side
from axolotl_mopo.logprobs.trees import Pair, pack
from axolotl_mopo.losses import amopo_loss, modpo_loss


@pytest.fixture(scope="module")
def rows():
    with (SMOKE / "pairs.jsonl").open() as file:
        raw = [json.loads(next(file)) for _ in range(6)]
    return Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in raw])


@pytest.fixture
def policy():
    return build_model(AutoConfig.from_pretrained(SMOKE / "model"))


def trl_arguments(config, tmp_path, **kwargs):
    return config(
        output_dir=str(tmp_path),
        per_device_train_batch_size=6,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        max_length=512,
        **kwargs,
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_modpo_with_one_objective_is_trls_dpo(rows, policy, tokenizer, tmp_path):
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl_arguments(DPOConfig, tmp_path, beta=0.3),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(policy, batch)
    expected_gradients = gradients(policy, expected)

    pairs = []
    for index in range(len(rows)):
        sequences = []
        for row in (index, index + len(rows)):
            ids, real, completion = (
                batch[name][row].tolist() for name in ("input_ids", "attention_mask", "completion_mask")
            )
            sequences.append([(t, c) for t, r, c in zip(ids, real, completion, strict=True) if r])
        prompt = [token for token, completion in sequences[0] if not completion]
        pairs.append(Pair([prompt], *([token for token, completion in s if completion] for s in sequences)))
    use_tree_attention(policy)
    use_tree_attention(reference)
    packed = pack(pairs)
    chosen, rejected = by_side(LogProbComputer()(policy, packed), 1)
    with torch.no_grad():
        ref_chosen, ref_rejected = by_side(LogProbComputer()(reference, packed), 1)
    losses, _, _ = modpo_loss(
        *(side.logps[:, 0] for side in (chosen, rejected, ref_chosen, ref_rejected)),
        torch.zeros(len(rows), 0),
        torch.zeros(len(rows), 0),
        beta=0.3,
        objective_weight=1.0,
        margin_weights=torch.zeros(0),
    )
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(gradients(policy, losses.mean()), expected_gradients, rtol=1e-4, atol=1e-5)


def test_amopo_with_one_plain_prompt_is_trls_simpo(rows, policy, tokenizer, tmp_path):
    trainer = CPOTrainer(
        model=policy,
        args=trl_arguments(CPOConfig, tmp_path, beta=2.0, simpo_gamma=0.7, loss_type="simpo", cpo_alpha=0.0),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(policy, batch)
    expected_gradients = gradients(policy, expected)

    def completion(side, index):
        return [token for token in batch[f"{side}_labels"][index].tolist() if token != -100]

    pairs = []
    for index in range(len(rows)):
        prompt = batch["prompt_input_ids"][index][batch["prompt_attention_mask"][index].bool()].tolist()
        pairs.append(Pair([prompt], completion("chosen", index), completion("rejected", index)))
    use_tree_attention(policy)
    chosen, rejected = by_side(LogProbComputer()(policy, pack(pairs)), 1)
    losses, _ = amopo_loss(
        chosen.logps,
        rejected.logps,
        chosen.lengths,
        rejected.lengths,
        torch.ones(len(rows), 1),
        beta=2.0,
        gamma=0.7,
    )
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(gradients(policy, losses.mean()), expected_gradients, rtol=1e-4, atol=1e-5)
