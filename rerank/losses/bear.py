"""Token loss: BEAR, which weighs tokens by how safely a beam search would keep them."""

import torch

from rerank.launch.values import check_range
from rerank.losses import LossInfo, LossInputs
from rerank.losses._inputs import check_count
from rerank.losses.msl import with_plain

INFO = LossInfo(
    tasks=("next_item",), constrained=True, needs="what msl needs", costs="msl and a top-k over the valid tokens"
)
XI = 2.75  # temperature of the sigmoid, published for the Toy set together with lambda_c 0.25


def bear(inputs: LossInputs, num_beams: int = 10, lambda_c: float = 0.25, temperature: float = 1.0) -> torch.Tensor:
    """-w log P(label), (P,), where w = 1 + lambda_c sigmoid((log P(label) - log beta) / XI), P over the valid tokens.

    beta is the num_beams-th largest P of the position, or its smallest where there are fewer; w has no gradient. The
    gradient is exactly that of the paper's L_SFT + lambda L_reg with beta held fixed, where lambda = XI * lambda_c.
    The paper writes a generic P; as in the released code, P and beta are over valid tokens here. The plain loss where
    the label is no token of an item. With lambda_c 0 it is `msl`.

    Args:
        inputs: Of a micro-batch.
        num_beams: Of the beam search that the model is trained for (K in the code, B in the paper).
        lambda_c: The released code's weight, not negative.
        temperature: Of the constrained softmax, above 0.

    Source: arXiv:2601.22925, eq. for L_BEAR and sigma_xi; Tiny-Snow/BEAR-SIGIR-2026 for w. The released code divides
    a micro-batch's sum by its sum of weights, which would make a step depend on how its batch is cut.
    """
    check_count("num_beams", num_beams)
    check_range("lambda_c", lambda_c, least=0)
    check_range("temperature", temperature, above=0)
    logps, num_valid, places = inputs.constrained_logps(temperature)
    label_logps = logps.gather(1, places[:, None])[:, 0]
    best = logps.detach().topk(min(num_beams, logps.shape[1]), dim=1).values  # -inf sorts last
    log_beta = best.gather(1, num_valid.clamp(max=best.shape[1])[:, None] - 1)[:, 0]
    weights = 1 + lambda_c * torch.sigmoid((label_logps.detach() - log_beta) / XI)
    return with_plain(inputs, -weights * label_logps)
