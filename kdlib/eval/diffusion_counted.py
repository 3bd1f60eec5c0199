"""What each number of a measurement of a diffusion language model counts, for the page and the JSON."""

from __future__ import annotations

COUNTED = {
    "accuracy": "lm-eval's score of the task, the first one it has or the one asked for by metric, with its 95% interval.",
    "forwards_per_answer": "Passes of the model that an answer took part in, until it was finished, mean over answers. Rows "
    "that share a batch do not add to each other's; an answer ends when all tokens before its end token are there.",
    "tokens_per_forward": "Tokens before the end token over passes, both added up over all answers. The end token and what "
    "fills the response behind it are no tokens here, but passes that commit them count: one token per step may be below 1.",
    "tokens_per_second": "Tokens before the end token over the seconds of all batches, on the machine and at the batch_size "
    "that are named: other ones have other ratios.",
    "aup": "Accuracy under parallelism (d3LLM): rho_1 y_1 + sum (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2 over "
    "points (tokens per forward rho, accuracy y in percent) in order of rho, those below y_1 - 5 left out, W(y) = min(exp(-3 "
    "(1 - y / y_max)), 1), y_max the highest accuracy of all that is compared here. Points of one strategy make a curve; the "
    "model's one-token-per-step point, where it was measured, belongs to each. A single point is its rectangle.",
    "guide_forwards": "Passes of a guiding model, beside the model's own; in no other number but the seconds.",
    "bits_per_byte_bound": "An upper bound, estimated by mc_samples random masks a row (kdlib.eval.diffusion_likelihood), of "
    "the tokens that training scores, without end padding, given the row's length.",
    "intervals": "95%: lm-eval's for scores; percentile bootstrap over answers for passes and tokens.",
}
