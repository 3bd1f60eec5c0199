"""What each number of a measurement of Jacobi decoding counts, for the page and the JSON."""

from __future__ import annotations

COUNTED = {
    "tokens_per_forward": "(new tokens - 1) / passes, over all prompts. The first new token comes from the prompt's pass, "
    "which is not counted, so plain greedy decoding is exactly 1. The stop token is a new token. A prompt's passes are those "
    "until it is finished; rows that share a batch do not add to each other's.",
    "by_block": "The same by block: tokens number b n + 1 to b n + n over the passes that began in block b (n is block_size, "
    "tokens are numbered from 0). The token that opens a block comes from the last pass of the block before it.",
    "iterations_per_block": "Passes that began in a block, the verifying one included: mean and distribution over blocks that "
    "took a pass. The last block of a response may be cut short.",
    "fast_forward": "Tokens that an iteration which changes its block makes right in an unbroken prefix; 1 when nothing is "
    "guessed right ahead.",
    "fast_forwarded": "Tokens of a block beyond one for each iteration that changes it, mean over blocks.",
    "stationary": "Tokens of a block that were right, and stayed so, while one before them was still wrong, mean over blocks.",
    "agreement": "Responses that are the model's own greedy tokens, and the share of these tokens before the first difference.",
    "timing": "Tokens per second of one prompt at a time, all new tokens over all seconds, the prompt's pass included, on the "
    "machine that is named: other machines have other ratios. Passes are without the prompts'.",
    "intervals": "95%, percentile bootstrap over prompts.",
}
