// The sides of the drills in JavaScript; commands and events are those of sides.py.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";

const [, , name, folder] = process.argv;
const found = createRequire(folder + "/");
const load = (what) => import(pathToFileURL(found.resolve(what)));
const tell = (...event) => process.stdout.write(JSON.stringify(event) + "\n");
const MARK = "END";

async function* words() {
  const began = performance.now();
  let said = 0;
  try {
    for (; said < 200; yield `${said++} `) await sleep(Math.max(0, began + said * 10 - performance.now()));
  } finally {
    tell("produced", said);
  }
}

async function* marked() {
  yield* words();
  yield MARK;
}

async function drain(stream) {
  for await (const _ of stream);
}

async function show(stream, seen) {
  if (!stream) return tell("end", "none");
  for await (const text of stream) {
    tell("text", text.replace(MARK, ""), seen === null ? "" : String((seen += text.length)));
    if (text.endsWith(MARK)) return tell("end", "whole");
  }
  tell("end", "cut");
}

const SIDES = {
  async "resumable-stream"() {
    const { createResumableStreamContext } = await load("resumable-stream");
    const context = createResumableStreamContext({ waitUntil: null });
    return {
      async produce(id) {
        const stream = await context.createNewResumableStream(id, () => ReadableStream.from(marked()));
        tell("ready", id);
        await drain(stream);
      },
      view: async (id, cursor) => show(await context.resumeExistingStream(id, Number(cursor)), Number(cursor)),
    };
  },

  async "assistant-stream"() {
    const { createResumableStreamContext } = await load("assistant-stream/resumable");
    const { createRedisResumableStreamStore } = await load("assistant-stream/resumable/redis");
    const client = (await load("redis")).createClient({ url: process.env.REDIS_URL });
    await client.connect();
    const store = createRedisResumableStreamStore(client);
    const context = createResumableStreamContext({ store });
    const bytes = () => ReadableStream.from(marked()).pipeThrough(new TextEncoderStream());
    return {
      async produce(id) {
        const stream = await context.run(id, bytes);
        tell("ready", id);
        await drain(stream);
      },
      view: async (id) => show((await context.resume(id))?.pipeThrough(new TextDecoderStream()), null),
      stop: (id) => store.finalize(id, "done"), // its context has no stop, but its store ends a stream for its writer
    };
  },

  async "durable-streams"() {
    const { DurableStream, stream } = await load("@durable-streams/client");
    const at = (id) => ({ url: `${process.env.DRILL_SERVER}/${id}` });
    return {
      async produce(id) {
        const handle = await DurableStream.create({ ...at(id), contentType: "text/plain" });
        tell("ready", id);
        for await (const word of words()) await handle.append(word);
        await handle.close();
      },
      async view(id, cursor) {
        const session = await stream({ ...at(id), offset: cursor || undefined, live: "sse" });
        session.subscribeText((chunk) => tell("text", chunk.text, chunk.offset));
        await session.closed;
        await sleep(200); // it is closed before its last chunk is told
        tell("end", session.streamClosed ? "whole" : "cut");
      },
      stop: async (id) => (await DurableStream.connect(at(id))).close(),
    };
  },

  async "durable-streams-server"() {
    const { DurableStreamTestServer } = await load("@durable-streams/server");
    return { produce: async () => tell("ready", await new DurableStreamTestServer({ port: 0 }).start()) };
  },
};

const side = await SIDES[name]();
tell("up");
for await (const line of createInterface({ input: process.stdin })) {
  const [verb, ...given] = JSON.parse(line);
  if (verb === "stop" && !side.stop) tell("cannot");
  else
    side[verb](...given).then(
      () => verb === "stop" && tell("stopped"),
      (error) => tell("end", error.code === "NOT_FOUND" ? "none" : `error: ${error.message}`),
    );
}
process.exit();
