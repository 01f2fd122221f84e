"""All ranks of a pipeline but the first: they compute what comes, and hear what was chosen."""

from collections import deque
from typing import Any

from torch import Tensor

from megatron.early_exit.inference.distributed.control import ControlPlane, Message
from megatron.early_exit.inference.distributed.draft_orders import (
    DraftOrder,
    drafted_message,
    orders_message,
    orders_of,
)
from megatron.early_exit.inference.distributed.pipeline_scores import scores_message, scores_of
from megatron.early_exit.inference.distributed.pipeline_stage import PipelineStage
from megatron.early_exit.inference.distributed.stage_task import StageBatch, StageTask
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.modes.mode import SampledToken
from megatron.early_exit.inference.results import GeneratedToken, HeadReport

_MAX_ROWS = 256
_WORTHWHILE_ROWS = 8
"""Rows that take hardly longer than one, because reading the weights is what takes the time."""


class PipelineWorker:
    """Has the interface of `DecodingLoop`: every rank runs the same script, so that the requests
    here are those of the driver under the same keys, and get the same tokens.

    Args:
        stage: of this process.
        control: messages to and from the other processes.
    """

    def __init__(self, stage: PipelineStage, control: ControlPlane) -> None:
        self.stage, self.control = stage, control
        self.requests: dict[int, Request] = {}
        self._tokens: list[tuple[Request, GeneratedToken]] = []
        self._rows: deque[list[StageTask]] = deque()
        self._orders: list[DraftOrder] = []
        self._last_key = self._last_unsettled = 0
        self._settled = self._settled_behind = 0
        """Of the requests up to these, nothing more comes from the stages before, and nothing is
        due here."""
        self._early: dict[int, list[Message]] = {}
        """What was chosen for requests that the script has yet to make."""
        self._closes = self._is_closed = self._is_leaving = False

    def submit(self, request: Request) -> None:
        """Take in a request."""
        self._last_key = request.key
        if not request.is_finished:
            self._last_unsettled = request.key
            self.requests[request.key] = request
            for message in self._early.pop(request.key, []):
                self._decide(message)

    def cancel(self, key: int) -> None:
        """End a request that is under way; nothing happens where there is none."""
        request = self.requests.pop(key, None)
        if request is not None:
            request.cancel()

    def step(self) -> list[tuple[Request, GeneratedToken]]:
        """Do what comes; where requests are under way, wait for it.

        When all have ended it also does what the others still need of this process: what calls it
        may wait for them next.

        Returns:
            The tokens that have become known since.
        """
        self._turn(wait=bool(self.requests))
        while not self.requests and self._settled_behind < self._last_unsettled:
            self._turn()
        tokens, self._tokens = self._tokens, []
        return tokens

    def close(self) -> None:
        """Compute what comes until the driver closes, whatever requests it is for."""
        self._is_leaving = True
        while not self._is_closed:
            self._turn()
        self.stage.finish()

    def _turn(self, wait: bool = True) -> None:
        """Do what comes, and what there is to do."""
        heard = self.control.receive(wait and not self._is_due())
        while heard is not None:
            self._hear(heard[0])
            heard = self.control.receive(wait=False)
        if self._orders:
            self._draft()
        if self._is_due():
            self._run()
        if self._settled_behind < self._settled and not self._is_due():
            self._settled_behind = self._settled
            self._pass_on({"kind": "settled", "key": self._settled})
        if self._closes and not self._rows:
            self._is_closed = True
            self._pass_on({"kind": "close"})

    def _hear(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "rows":
            self._rows.append([StageTask.from_message(task) for task in message["tasks"]])
            # At once, although they may wait here: until then the stage before waits for this one
            # wherever it has to wait for its whole device.
            self._expect(sum(task.num_sent for task in self._rows[-1]))
        elif kind == "expect":
            self._expect(message["num_rows"])
        elif kind == "batch":
            batch = [[StageTask.from_message(task) for task in tasks] for tasks in message["tasks"]]
            self.stage.run(batch, lambda task, logits: None, lambda tasks: None)
        elif kind == "draft":
            self._take_orders(orders_of(message))
        elif kind == "score":
            self._score(message)
        elif kind == "pages":
            # They are about positions that have come before.
            while self._rows:
                self._run()
            self._pass_on(message)
            self.stage.manage(message)
        elif kind == "forget":
            self._pass_on(message)
            self.stage.forget(message["key"])
        elif kind == "settled":
            self._settled = message["key"]
        elif kind == "close":
            self._closes = True
        elif message["key"] > self._last_key and not self._is_leaving:
            self._early.setdefault(message["key"], []).append(message)
        else:
            self._decide(message)

    def _expect(self, num_rows: int) -> None:
        rank_info = self.stage.rank_info
        if rank_info.rank == rank_info.leader:
            for rank in rank_info.peers:
                self.control.send(rank, {"kind": "expect", "num_rows": num_rows})
        self.stage.expect(num_rows)

    def _decide(self, message: Message) -> None:
        request = self.requests.get(message["key"])
        if request is None:
            return
        if message["kind"] == "failed":
            request.fail(message["error"])
        elif message["kind"] != "cancelled":
            if message["kind"] == "scored":
                request.take_scores(scores_of(message))
            else:
                self._tokens.append((request, request.take(_sampled(message["token"]))))
            if not request.is_finished:
                return
        self.cancel(request.key)

    def _score(self, message: Message) -> None:
        # Hidden states come in the order of the messages.
        while self._rows:
            self._run()
        self._pass_on(message)
        scores = self.stage.score(message)
        rank_info = self.stage.rank_info
        if rank_info.rank == rank_info.leader:
            where = {"start": message["piece"]["start"], "stage": rank_info.stage}
            self.control.send(0, scores_message(message["key"], scores, **where))

    def _take_orders(self, orders: list[DraftOrder]) -> None:
        drafts, rank_info = self.stage.drafts, self.stage.rank_info
        if rank_info.rank == rank_info.leader:
            # Those that have come by the end of the turn run together.
            self._orders += orders
        elif drafts is not None:
            drafts.run(orders)

    def _draft(self) -> None:
        """Have the multi-token-prediction module draft what has been ordered."""
        drafts = self.stage.drafts
        assert drafts is not None
        orders, self._orders = drafts.accepted(self._orders), []
        if not orders:
            return
        for rank in self.stage.rank_info.peers:
            self.control.send(rank, orders_message(orders))
        for order, outputs in zip(orders, drafts.run(orders), strict=True):
            attached = outputs[0].logits.cpu().numpy().tobytes() if order.logits else None
            self.control.send(0, drafted_message(order, outputs), attached)

    def _is_due(self) -> bool:
        """Whether to run what waits: rows that only fill caches wait for company, or for a row
        with a token to find."""
        tasks = [task for message in self._rows for task in message]
        asks = any(task.final or task.next_exit is not None for task in tasks)
        if asks or (tasks and self._closes):
            return True
        return sum(task.num_rows for task in tasks) >= _WORTHWHILE_ROWS

    def _run(self) -> None:
        """Run everything that waits, as far as it fits together."""
        batch = StageBatch()
        messages: list[list[StageTask]] = []
        while self._rows and batch.fits(self._rows[0]):
            if messages and batch.num_rows + sum(w.num_rows for w in self._rows[0]) > _MAX_ROWS:
                break
            messages.append(self._rows.popleft())
            batch.add(messages[-1])
        rank_info = self.stage.rank_info
        tasks = [[task.message() for task in message] for message in messages]
        for rank in rank_info.peers:
            self.control.send(rank, {"kind": "batch", "tasks": tasks})
        self.stage.run(messages, self._report, self._hand_on)

    def _hand_on(self, tasks: list[StageTask]) -> None:
        rows = [task.message() for task in tasks]
        self.control.send(self.stage.rank_info.next_leader, {"kind": "rows", "tasks": rows})

    def _report(self, task: StageTask, logits: Tensor) -> None:
        attached = logits.cpu().numpy().tobytes() if task.logits else None
        self.control.send(0, {"kind": "found", "task": task.message()}, attached)

    def _pass_on(self, message: Message) -> None:
        rank_info = self.stage.rank_info
        if rank_info.rank == rank_info.leader:
            for rank in rank_info.peers:
                self.control.send(rank, message)
            if not rank_info.is_last_stage:
                self.control.send(rank_info.next_leader, message)


def _sampled(values: dict[str, Any]) -> SampledToken:
    top = tuple((token, logprob) for token, logprob in values["top_logprobs"])
    heads = tuple(HeadReport(**head) for head in values["heads"])
    return SampledToken(**{**values, "top_logprobs": top, "heads": heads})
