"""Hold Axolotl's Triton kernel for log-probs against ours, by Triton's interpreter, which runs it on a CPU."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from axolotl.monkeypatch.trainer import utils

from axolotl_mopo.logprobs.log_softmax import selective_log_softmax


def by_triton(logits, index):
    """What `utils.selective_log_softmax` does with tensors on a GPU, with blocks smaller than the vocabulary."""
    targets = index.shape[-1]
    block = 1 << (targets - 1).bit_length()
    arguments = (targets, block, logits.shape[-1], 64, 8)
    return utils._SelectiveLogSoftmaxTriton.apply(logits, index, *arguments)[:, :targets]


def main() -> None:
    """Logits near and far from 0, one target a row and several, the same target twice, more rows than a grid."""
    torch.manual_seed(0)
    for rows, vocabulary, targets, scale in ((11, 97, 1, 1.0), (9, 200, 3, 30.0), (3, 64, 4, 1.0)):
        index = torch.randint(0, vocabulary, (rows, targets))
        index[0] = index[0, 0]
        gradient = torch.randn(rows, targets)
        found = []
        for function in (by_triton, selective_log_softmax):
            logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)).mul_(scale)
            logits.requires_grad_()
            logps = function(logits * 1.0, index)
            logps.backward(gradient)
            found.append((logps.detach(), logits.grad))
        reference = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)).mul_(scale).double()
        reference.requires_grad_()
        expected = reference.log_softmax(-1).gather(-1, index)
        expected.backward(gradient.double())
        for logps, grad in found:
            assert torch.allclose(logps.double(), expected.detach(), atol=1e-5), (logps, expected)
            assert torch.allclose(grad.double(), reference.grad, atol=1e-5)


if __name__ == "__main__":
    main()
