// The sides of the drills in JavaScript; commands and events are those of sides.py.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";

const [, , folder, name] = process.argv;
const found = createRequire(folder + "/");
const load = (what) => import(pathToFileURL(found.resolve(what)));
const tell = (...event) => process.stdout.write(JSON.stringify(event) + "\n");
const MARK = "END"; // after the last word, where nothing but text is carried

async function* words() {
  for (let number = 0; number < 200; number++) {
    await sleep(10);
    yield `${number} `;
  }
  tell("produced");
}

async function* marked() {
  yield* words();
  yield MARK;
}

async function drain(id, stream) {
  tell("ready", id);
  for await (const _ of stream);
}

async function show(stream, seen = NaN) {
  for await (const text of stream ?? []) {
    seen += text.length;
    tell("text", text.replace(MARK, ""), String(seen || ""));
    if (text.endsWith(MARK)) tell("end", "whole");
  }
  tell("end", "cut"); // unless another end came before
}

const SIDES = {
  async "resumable-stream"() {
    const { createResumableStreamContext } = await load("resumable-stream");
    const context = createResumableStreamContext({ waitUntil: null });
    return {
      produce: async (id) => drain(id, await context.createNewResumableStream(id, () => ReadableStream.from(marked()))),
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
      produce: async (id) => drain(id, await context.run(id, bytes)),
      view: async (id) => show((await context.resume(id))?.pipeThrough(new TextDecoderStream())),
      stop: (id) => store.finalize(id, "done"), // the context has no stop, but its store ends a stream for its writer
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
  else side[verb](...given).then(() => verb === "stop" && tell("stopped"), (error) => tell("end", error.message));
}
process.exit();
