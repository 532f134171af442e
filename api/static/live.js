// The live view: asks for /stats every second while it is seen.

import { byId, element } from "./elements.js";
import { bar, drawLine, drawPages } from "./pictures.js";
import { History } from "./rates.js";
import { asRefusal, readJson } from "./server.js";

const PERIOD_MS = 1000;
const LATENCIES = {
  ttft: "First token", itl: "Between tokens", e2e: "Whole answer", queue: "In the queue",
};
const FINISHES = {
  stop: "Answers to their end", length: "Answers cut at their length", abort: "Answers aborted",
  error: "Answers failed",
};

export class LiveView {
  constructor() {
    this.history = new History();
    this.shown = false; // whether this is the view
    this.timer = null;
    document.addEventListener("visibilitychange", () => this.restart());
  }

  show(shown) {
    this.shown = shown;
    this.restart();
  }

  restart() {
    clearTimeout(this.timer);
    if (this.shown && !document.hidden) this.look();
  }

  async look() {
    const turn = {};
    this.turn = turn;
    try {
      this.draw(await readJson("stats"));
      byId("trouble").hidden = true;
    } catch (error) {
      byId("trouble").textContent = asRefusal(error).message;
      byId("trouble").hidden = false;
    }
    // Of two that were started only the newer goes on.
    if (this.turn !== turn || !this.shown || document.hidden) return;
    this.timer = setTimeout(() => this.look(), PERIOD_MS);
  }

  draw(stats) {
    this.history.add(stats, performance.now());
    write("facts", `${stats.state} · up ${duration(stats.uptime_s)} · scheduler mode ${stats.scheduler_mode}`);
    for (const name of ["rate", "running", "waiting"]) {
      const values = this.history.series(name);
      write(name, count(values.at(-1)));
      drawLine(byId(`${name}-line`), values);
    }
    drawHits(stats.cache);
    drawPages(byId("pages"), stats.pages);
    write("pages-used", count(stats.pages.leased));
    write("pages-cached", count(stats.pages.cached));
    write("pages-free", count(stats.pages.free));
    byId("latency").replaceChildren(...Object.entries(LATENCIES).map(latencyRow(stats.latency_ms)));
    byId("totals").replaceChildren(...totals(stats.totals));
    byId("engines").replaceChildren(...stats.replicas.map(engineRow));
  }
}

const write = (id, text) => { byId(id).textContent = text; };
const count = (value) => Math.round(value).toLocaleString("en");

function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  if (minutes < 60) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function drawHits({ hit_rate: rate, cached_tokens: cached, prompt_tokens: prompt }) {
  write("hits", rate === null ? "–" : `${Math.round(rate * 100)} %`);
  write("hits-of", `${count(cached)} of ${count(prompt)} prompt tokens`);
}

function latencyRow(measured) {
  return ([name, title]) => element(
    "tr", {}, element("th", { scope: "row" }, title),
    ...["p50", "p90", "p99"].map((each) => element("td", {}, milliseconds(measured[name][each]))),
  );
}

function milliseconds(value) {
  if (value === null) return "–";
  return value < 10 ? value.toFixed(1) : count(value);
}

function totals({ requests, rejected, generated_tokens: generated, prompt_tokens: prompt }) {
  const entries = [["Tokens generated", generated], ["Tokens of prompts", prompt]];
  for (const [reason, title] of Object.entries(FINISHES)) entries.push([title, requests[reason]]);
  entries.push(["Requests refused", rejected]);
  return entries.flatMap(([title, value]) => [
    element("dt", {}, title), element("dd", {}, count(value)),
  ]);
}

function engineRow({ index, device, state, inflight, restarts, load }) {
  const share = load && load.pages_total ? load.pages_leased / load.pages_total : 0;
  return element(
    "tr", {}, element("th", { scope: "row" }, `${index} · ${device}`),
    element("td", {}, state), element("td", {}, count(inflight)),
    element("td", {}, bar(share), `${Math.round(share * 100)} %`), element("td", {}, count(restarts)),
  );
}
