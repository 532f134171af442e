// Server-sent events of an OpenAI stream: the JSON of each, until the stream says that it is done.

const DONE = "[DONE]";
const FIELD = "data: ";

export async function* events(stream) {
  let rest = "";
  for await (const text of pieces(stream.pipeThrough(new TextDecoderStream()))) {
    const parts = (rest + text).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.slice(FIELD.length);
      if (data === DONE) return;
      yield JSON.parse(data);
    }
  }
}

// Not every browser can iterate over a stream.
async function* pieces(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {}); // one that broke has nothing to cancel
  }
}
