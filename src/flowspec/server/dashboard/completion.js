// One streamed completion of the OpenAI-compatible API.

/** Yields {id, text} for each chunk and {id, usage} at the end; throws an Error with the server's own message. */
export async function* complete(path, body, signal) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!answer.ok) {
    const error = await answer.json().then((json) => json.error?.message, () => null);
    throw new Error(error ?? `The server answered ${answer.status} ${answer.statusText}`.trim());
  }
  for await (const data of serverSentEvents(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices[0];
    yield { id: chunk.id, text: choice?.text ?? choice?.delta?.content ?? "", usage: chunk.usage };
  }
  throw new Error("The connection ended before the text did.");
}

async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
