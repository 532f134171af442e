// The playground: one conversation, one answer at a time.

import { curlCommand } from "./curl.js";
import { byId } from "./elements.js";
import { events } from "./events.js";
import { apiKey } from "./key.js";
import { Refusal, address, asRefusal, openStream } from "./server.js";
import { fault, sampling, systemPrompt } from "./settings.js";
import { Transcript } from "./transcript.js";

const PATH = "v1/chat/completions";

export class Playground {
  constructor() {
    this.messages = []; // what was said, without the system prompt
    this.going = null; // the AbortController of the answer that is on its way
    this.transcript = new Transcript(byId("transcript"));
    this.box = byId("message");
    this.settings = byId("settings");
    this.listen();
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.settings.addEventListener("submit", (event) => event.preventDefault());
    this.box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
    byId("stop").addEventListener("click", () => this.stop());
    byId("clear").addEventListener("click", () => this.clear());
    byId("copy").addEventListener("click", () => this.copy());
  }

  stop() {
    this.going?.abort();
  }

  clear() {
    this.stop();
    this.messages = [];
    this.transcript.clear();
    this.tell("");
    this.box.focus();
  }

  async send() {
    const text = this.box.value.trim();
    const wrong = fault(this.settings);
    if (this.going || !text) return;
    if (wrong) {
      this.tell(wrong);
      return;
    }
    const question = { role: "user", content: text };
    const messages = [...this.messages, question];
    const body = this.body(messages);
    this.showCurl(body);
    this.transcript.addUser(text);
    this.box.value = "";
    const reply = await this.answer(body);
    if (!reply) this.box.value ||= text; // nothing came of it: to be sent again
    else if (this.messages.length === messages.length - 1) {
      this.messages = [...messages, { role: "assistant", content: reply }];
    } // else the conversation was cleared meanwhile
  }

  body(messages) {
    return {
      messages: [...systemPrompt(this.settings), ...messages],
      ...sampling(this.settings),
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  // Returns what was said, as far as it came; empty when nothing did.
  async answer(body) {
    const turn = this.transcript.addAnswer();
    const heard = new Heard(turn);
    this.begin();
    try {
      for await (const chunk of events(await openStream(PATH, body, this.going.signal))) {
        heard.take(chunk);
      }
      turn.end(heard.note());
      this.end("Answered");
    } catch (error) {
      if (error.name === "AbortError") {
        turn.end(heard.note("stopped"));
        this.end("Stopped");
      } else {
        turn.fail(asRefusal(error).message);
        this.end("Failed");
      }
    }
    return heard.text;
  }

  begin() {
    this.going = new AbortController();
    this.tell("Answering");
    this.setBusy(true);
  }

  end(words) {
    this.going = null;
    this.tell(words);
    this.setBusy(false);
  }

  setBusy(busy) {
    const holdsFocus = [byId("stop"), byId("send")].includes(document.activeElement);
    byId("stop").hidden = !busy;
    byId("send").hidden = busy;
    if (holdsFocus) byId(busy ? "stop" : "send").focus(); // what is hidden would lose it
  }

  showCurl(body) {
    byId("curl").textContent = curlCommand(address(PATH), body, apiKey() !== "");
    byId("copy").disabled = false;
  }

  async copy() {
    const selection = getSelection();
    selection.selectAllChildren(byId("curl")); // where the clipboard is closed, Ctrl-C remains
    try {
      await navigator.clipboard.writeText(byId("curl").textContent);
      this.tell("Copied");
    } catch {
      this.tell("Selected: press Ctrl-C to copy");
    }
  }

  tell(words) {
    byId("status").textContent = words;
  }
}

// What has come of an answer.
class Heard {
  constructor(turn) {
    this.turn = turn;
    this.text = "";
    this.finish = null;
    this.usage = null;
    this.asked = performance.now();
    this.first = null; // when the first piece came
  }

  take(chunk) {
    if (chunk.error) throw new Refusal(chunk.error.message, 200);
    this.usage = chunk.usage ?? this.usage;
    for (const choice of chunk.choices) {
      const { content, reasoning_content: thought } = choice.delta;
      if (content || thought) this.first ??= performance.now();
      if (thought) this.turn.think(thought);
      if (content) this.turn.say(content);
      this.text += content ?? "";
      this.finish = choice.finish_reason ?? this.finish;
    }
  }

  note(ending = this.finish) {
    const parts = [];
    if (this.usage) parts.push(...this.counts());
    if (this.first) parts.push(`first after ${Math.round(this.first - this.asked)} ms`);
    if (ending === "length") parts.push("cut at the maximal length");
    else if (ending !== "stop") parts.push(ending ?? "no end was told");
    return parts.join(" · ");
  }

  counts() {
    const { completion_tokens: tokens, prompt_tokens: prompt, prompt_tokens_details: details } = this.usage;
    const seconds = (performance.now() - this.first) / 1000;
    const rate = tokens > 1 && this.first ? [`${((tokens - 1) / seconds).toFixed(1)} tokens/s`] : [];
    return [`${tokens} tokens`, ...rate, `prompt ${prompt}, ${details?.cached_tokens ?? 0} cached`];
  }
}
