// What was said, on the page. Keeps the end in sight as long as the reader has not scrolled away.

import { element } from "./elements.js";

const NEAR = 60; // pixels from the end that still count as being there

export class Transcript {
  constructor(box) {
    this.box = box;
    this.welcome = [...box.children];
  }

  clear() {
    this.box.replaceChildren(...this.welcome);
  }

  addUser(text) {
    for (const each of this.welcome) each.remove();
    const turn = element("div", { class: "turn user" }, element("div", { class: "text" }, text));
    this.box.append(turn);
    this.toEnd();
    return turn;
  }

  addAnswer() {
    const answer = new AnswerTurn(this);
    this.box.append(answer.turn);
    this.toEnd();
    return answer;
  }

  // Change something, and follow if the end was in sight.
  keepingEnd(change) {
    const { scrollHeight, scrollTop, clientHeight } = this.box;
    const follows = scrollHeight - scrollTop - clientHeight < NEAR;
    change();
    if (follows) this.toEnd();
  }

  toEnd() {
    this.box.scrollTop = this.box.scrollHeight;
  }
}

class AnswerTurn {
  constructor(transcript) {
    this.transcript = transcript;
    this.words = document.createTextNode("");
    this.thoughts = null; // made with the first of them
    // Busy: a screen reader waits, and reads the answer when it is whole.
    this.turn = element(
      "div", { class: "turn answer", "aria-busy": "true" },
      element("div", { class: "text" }, this.words),
    );
  }

  say(text) {
    this.transcript.keepingEnd(() => this.words.appendData(text));
  }

  think(text) {
    this.thoughts ??= this.startThoughts();
    this.transcript.keepingEnd(() => this.thoughts.appendData(text));
  }

  startThoughts() {
    const thoughts = document.createTextNode("");
    this.turn.prepend(
      element(
        "details", { class: "thoughts", open: "" },
        element("summary", {}, "Thoughts"), element("div", { class: "text" }, thoughts),
      ),
    );
    return thoughts;
  }

  end(note) {
    this.close(element("p", { class: "note" }, note));
  }

  fail(words) {
    this.close(element("p", { class: "trouble", role: "alert" }, words));
  }

  close(last) {
    this.transcript.keepingEnd(() => this.turn.append(last));
    this.turn.setAttribute("aria-busy", "false");
  }
}
