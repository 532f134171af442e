// Puts the page together.

import { byId } from "./elements.js";
import { startKey } from "./key.js";
import { LiveView } from "./live.js";
import { Playground } from "./playground.js";
import { asRefusal, readJson } from "./server.js";
import { startTheme } from "./theme.js";
import { startViews } from "./views.js";

const AGAIN_MS = 2000; // while the engines start
const STARTING = 503;

async function nameModel() {
  try {
    const { data } = await readJson("v1/models");
    byId("model").textContent = data[0].id;
  } catch (error) {
    const { status, message } = asRefusal(error);
    byId("model").textContent = message;
    if (status === STARTING) setTimeout(nameModel, AGAIN_MS);
  }
}

// Beside the conversation the settings stand open; above it, on a narrow page, they are folded.
function foldSettings(side) {
  const isWide = matchMedia("(min-width: 60.01rem)");
  const fold = () => { side.open = isWide.matches; };
  isWide.addEventListener("change", fold);
  fold();
}

startTheme(byId("theme"));
foldSettings(byId("side"));
startKey(byId("key"), nameModel);
new Playground();
const live = new LiveView();
startViews([...document.querySelectorAll("nav a")], (name) => live.show(name === "live"));
nameModel();
