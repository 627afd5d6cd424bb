"""Likelihoods of a text under a causal model, computed token by token."""

import torch


@torch.no_grad()
def likelihood_by_hand(model, tokenizer, text, continuation):
    """`log p(continuation | text)`."""
    ids = tokenizer.encode(text)
    total = 0.0
    for token in tokenizer.encode(text + continuation)[len(ids) :]:
        total += model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
        ids = [*ids, token]
    return total


@torch.no_grad()
def said_by_hand(model, tokenizer, text, longest):
    """The greedy continuation of at most `longest` tokens, to the end of the line."""
    ids = tokenizer.encode(text)
    start = len(ids)
    while len(ids) < start + longest:
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip().split("\n")[0]
