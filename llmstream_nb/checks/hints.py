"""The hints of each check: three, from a pointer to the essential line."""

from __future__ import annotations

HINTS = {
    "count_entries": (
        "The key holds the prefix, the answer's id in braces, and `chunks`; `tables.keys(answer)` lists it.",
        "XLEN counts entries: not only those with text, but also the start and the end.",
        "`count = redis.xlen(key)`",
    ),
    "stopped": (
        "`ask` returns at once, while the answer is still written: `half.text` grows, and `half.stop()` ends it.",
        "Give the model time to begin: look at `half.text` again and again, with pauses, until there is something.",
        "`while len(half.text) < 100: time.sleep(0.05)`, and then `half.stop()`",
    ),
    "get_last_id": (
        "XREVRANGE reads a stream backwards, from `+` to `-`; with COUNT 1 it gives only the newest entry.",
        "`redis.xrevrange(key, count=1)` is a list: empty, or with one pair of an ID and a dictionary.",
        '`newest = redis.xrevrange(key, count=1)`, then `return newest[0][0] if newest else "0-0"`',
    ),
    "pages": (
        "XRANGE with `count=size` gives one page. The next one begins after the last ID of this one, not with it.",
        "A `(` before an ID leaves that entry out: `(1-3` is everything after 1-3. An empty page is the end.",
        "`while page := redis.xrange(key, after, '+', count=size):` append it, then `after = '(' + page[-1][0]`",
    ),
    "collect": (
        "Note when it has to be over before the first read: `time.monotonic() + seconds`. Each read has only the rest.",
        "`block=0` waits for ever: at least 1. And `count` is what is still wanted, so that you never get too many.",
        "`left = deadline - time.monotonic()`, `block=max(1, int(left * 1000))`; the end is when `left` is 0 or less.",
    ),
    "produce": (
        "One XADD for each delta, inside the loop; and one more after the loop, for the end.",
        "Each entry has the fields `questionId` and `chunkOutput`; at the end that is `;END:` plus the id.",
        "`try:` the loop, `finally:` the end. What stands under `finally` also runs when the loop raises.",
    ),
    "rebuild": (
        "GET gives the record as JSON text; `json.loads` makes a dictionary of it, which says where the answer lies.",
        "XRANGE from the record's start to its end. Others have written in between: look at each `questionId`.",
        "`redis.xrange(record['streamName'], record['streamStartMessageId'], record['streamEndMessageId'])[1:-1]`",
    ),
    "read": (
        "Look at every entry once: go on from the ID of the last one you saw, whoever it belongs to.",
        "Skip what has another `questionId`; stop at yours whose `chunkOutput` is the end, and nothing else.",
        "`while True:` XREAD `{key: last_id}`, `block=1000`; at each entry `last_id = entry_id` first.",
    ),
    "read_many": (
        "XREAD takes a dictionary: for each stream the last ID that you saw there. All of them go into one call.",
        "Begin with `0-0` for each. The reply names the stream of each list of entries: note the ID under that name.",
        "`while last_ids: for key, entries in redis.xread(last_ids, block=1000):` and at an end `del last_ids[key]`",
    ),
    "claim": (
        "XAUTOCLAIM gives `consumer` what is pending in its group; XACK takes an entry off the pending list.",
        "XAUTOCLAIM claims 100 entries a call: go on from the cursor that it returns, until that is `0-0`.",
        "Loop: `cursor, entries, *_ = client.xautoclaim(stream, group, consumer, 0, cursor)`, XACK, keep the texts.",
    ),
    "source": (
        "`question.upper().split()` gives the words; `yield` each of them, one after another.",
        "A function with `yield` in its body is a generator: it returns at once, and is run piece by piece.",
        "`for n, word in enumerate(question.upper().split()):` and in it `yield f' {word}' if n else word`.",
    ),
    "poll": (
        "XRANGE with `(` before the first ID begins after it: `redis.xrange(key, f'({last}')`.",
        "Only text is added; any other `kind` ends the answer. Where nothing is new, `last` stays as it was.",
        "`for last, entry in redis.xrange(key, f'({last}'):` add the text or set `over`; return all three.",
    ),
    "work": (
        "Two reads by XREADGROUP: `0` gives what is pending with `consumer`, `>` what nobody was given yet.",
        "For each entry first `do(fields['text'])`, then XACK: if `do` raises, the XACK is never reached.",
        "`for begin in ('0', '>'):` and in it `client.xreadgroup(group, consumer, {stream: begin})`.",
    ),
    "resume": (
        "XREAD gives what comes after an ID: begin with `after`, then go on from the ID of each entry you saw.",
        "Look at the field `kind`: `text` is added, `start` empties the text, `end` and `error` return it.",
        "`while True:` XREAD `{key: after}`, `block=1000`; `for after, entry in entries:` and then by `kind`.",
    ),
    "state": (
        "Two questions: what kind is the newest entry, and if that is no end, does its attempt still have a lease?",
        "XREVRANGE with `count=1` gives the newest entry; the attempt is its ID's part before the hyphen.",
        "`redis.exists(f'{answer}:lease:{attempt}')` is 1 while that attempt's producer lives.",
    ),
    "missing": (
        "Go through the IDs, and remember at each which number is due next.",
        "The two parts are numbers: `attempt, seq = map(int, entry_id.split('-'))`. A new attempt is due at 0.",
        "Between what is due and `seq`: `gaps += [f'{attempt}-{n}' for n in range(due, seq)]`, then `due = seq + 1`.",
    ),
    "budget": (
        "Alive at a time are the answers of one `ttl`; each takes `maxlen` entries and a record.",
        "Begin with the least that both promises need: what can be kept beyond that depends on the memory.",
        "`maxlen = behind`, `ttl = back_within`: the least of both. Is there room for more?",
    ),
    "lag": (
        "XINFO GROUPS tells each group's place, its `last-delivered-id`. What comes after it was not given yet.",
        "A round bracket before an ID leaves that entry out: `(1-3` is everything after 1-3.",
        "`len(redis.xrange(stream, min=f'({place}'))`, where `place` is the `last-delivered-id` of this group.",
    ),
    "last_event_id": (
        "Only `end` and `failed` are the end. When the events stop without one, come back with the last `id` you saw.",
        "Keep `headers` outside of your loop, and set them anew at each event that has an `id`; some have none.",
        "`while True:` and in it `for event in get(headers):`, with `headers = {'Last-Event-ID': event['id']}`.",
    ),
    "parse": (
        "Keep what the event so far has: its `event`, its list of `data`. An empty line ends it and begins the next.",
        "`line.partition(':')` gives name and value; one space before the value is not part of it.",
        "At an empty line: `if data: events.append({'id': last_id, 'event': event, 'data': '\\n'.join(data)})`.",
    ),
}  # by the check's name
