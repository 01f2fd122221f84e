"""What the driver orders of the module, and what it hears of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.distributed.draft_orders import (
    DraftOrders,
    drafted_message,
    orders_of,
    outputs_of,
)
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.modes.head_output import head_outputs
from tests.helpers.mtp_models import mtp_model

FIELDS: dict[str, Any] = {"mode": "self_speculative", "draft_method": "mtp", "max_tokens": 9}


def requests_of(*params: SamplingParams) -> list[Request]:
    engine = EarlyExitEngine(mtp_model(2).segmented)
    requests = [engine.submit([3, 1, 4], one) for one in params]
    for slot, request in enumerate(requests):
        request.sequence.slot = slot
    return requests


def test_the_last_stage_is_told_of_each_token_once():
    sent: list[str] = []
    orders = DraftOrders(lambda message: sent.append(json.dumps(message)))
    greedy, drawn = requests_of(
        SamplingParams(**FIELDS), SamplingParams(**FIELDS, temperature=1.0, seed=1)
    )
    orders.send()
    assert sent == []
    orders.add(greedy)
    orders.add(drawn)
    orders.send()
    first, second = orders_of(json.loads(sent.pop()))
    assert (first.key, first.slot, second.key, second.slot) == (greedy.key, 0, drawn.key, 1)
    assert (first.start, first.tokens, first.drafts) == (0, (3, 1, 4), ())
    # Greedy drafts are wanted at once; what is drawn is drawn by the driver, one after another.
    assert (first.most, first.logits) == (2, False)
    assert (second.most, second.logits) == (1, True)
    drawn.sequence.drafts.append(7)
    orders.add(drawn)
    orders.send()
    (order,) = orders_of(json.loads(sent.pop()))
    assert (order.start, order.tokens, order.drafts, order.most) == (3, (), (7,), 1)
    drawn.sequence.drafts.clear()
    drawn.sequence.generated += [7, 5]
    orders.add(drawn)
    orders.add(greedy)
    orders.forget(greedy.key)
    orders.send()
    (order,) = orders_of(json.loads(sent.pop()))
    assert (order.key, order.start, order.tokens) == (drawn.key, 3, (7, 5))
    # In another slot everything is new.
    orders.forget(drawn.key)
    orders.add(drawn)
    orders.send()
    (order,) = orders_of(json.loads(sent.pop()))
    assert (order.start, order.tokens) == (0, (3, 1, 4, 7, 5))


def test_answers_come_back_as_they_were():
    (request,) = requests_of(SamplingParams(**FIELDS))
    sent: list[Any] = []
    orders = DraftOrders(sent.append)
    orders.add(request)
    orders.send()
    (order,) = orders_of(sent.pop())
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    outputs = head_outputs(logits)
    message = json.loads(json.dumps(drafted_message(order, outputs)))
    assert (message["kind"], message["key"]) == ("drafted", request.key)
    (found,) = outputs_of(message, logits[0])
    assert torch.equal(found.logits, outputs[0].logits)
    assert replace(found, logits=logits) == replace(outputs[0], logits=logits)
