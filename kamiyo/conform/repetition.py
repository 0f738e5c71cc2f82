"""What comes again: duplicates, one after another and all at once, and redelivery after a failure."""

from collections import Counter

from kamiyo.conform import samples
from kamiyo.conform.check import check
from kamiyo.conform.target import NOTHING_TO_OBSERVE, Fault, Target, Unseen, told

# Copies of one event at the same moment, and how many events that is done with.
_COPIES = 16
_ROUNDS = 3


@check(
    "duplicate",
    "Stripe delivers an event again whenever it is not sure of the answer, and by hand for 30 days. It must "
    "be answered 2xx (else it comes again for three days), and must not have its effect twice.",
)
async def duplicate(target: Target) -> str:
    """Deliver an event, wait for its effect, deliver it again under a new stamp."""
    sample = samples.customer()
    await target.accepts(sample, what="the first time")
    await target.effect(sample)
    await target.accepts(sample, target.signature(sample.body, age=-1), what="the second time")
    seen = await target.effect(sample)
    return "accepted twice, stored once" if seen else f"accepted twice; {NOTHING_TO_OBSERVE}"


@check(
    "concurrent duplicates",
    "Copies of one event do arrive at the same moment. Asking first and storing then is a race: one wins, "
    "the others break (5xx, so Stripe sends them again) or have their effect as well.",
)
async def concurrent_duplicates(target: Target) -> str:
    """Deliver one event many times at the same moment; three events, one after another."""
    answers: Counter[str] = Counter()
    seen = False
    for _ in range(_ROUNDS):
        sample = samples.customer()
        copies = [(sample.body, [target.signature(sample.body)])] * _COPIES
        got = await target.post_together(copies)
        answers.update(told(answer) for answer in got if not answer.accepted)
        if not answers:
            seen = await target.effect(sample)
    if answers:
        copies_sent = _COPIES * _ROUNDS
        raise Fault("; ".join(f"{count} of {copies_sent} copies: {words}" for words, count in answers.items()))
    return f"every copy is accepted{', each event stored once' if seen else '; ' + NOTHING_TO_OBSERVE}"


@check(
    "redelivery after a failure",
    "After an error, or an answer that never came, Stripe sends the event again. Who notes the id first and "
    'works then answers "seen before" to an event whose work was never done: it is lost, silently.',
)
async def redelivery(target: Target) -> str:
    """Let deliveries fail in three ways, and deliver them again.

    Hang up right after the last byte; hang up in the middle; and send a subscription before its customer,
    which breaks many receivers the first time.
    """
    unanswered, cut = samples.customer(), samples.customer()
    await target.abandon(unanswered)
    await target.abandon(cut, share=0.5)
    world = samples.new_world()
    world.subscribe(world.create_customer(), "pro", trial_days=14)
    events = [samples.sample_of(event) for event in world.events]
    [parent] = [one for one in events if one.event_type == "customer.created"]
    [child] = [one for one in events if one.event_type == "customer.subscription.created"]
    first = await target.post(child.body, target.signature(child.body))
    await target.accepts(parent, what="the customer of a subscription that came before")
    seen = []
    for what, one in (
        ("hung up after the last byte", unanswered),
        ("hung up half way", cut),
        (
            "before its customer" if first.accepted else f"before its customer ({told(first)}), then again",
            child,
        ),
    ):
        await target.accepts_again(one, what=what)
        seen.append(await target.effect(one, what=what))
    if not all(seen):
        raise Unseen(f"each is accepted the second time; {NOTHING_TO_OBSERVE}")
    return "each is accepted the second time, and processed once"


CHECKS = (duplicate, concurrent_duplicates, redelivery)
