// Which of the views is shown: the one that the address names, else the first.

import { byId } from "./elements.js";

export function startViews(links, onChange) {
  const names = links.map((link) => link.hash.slice(1));
  const show = () => {
    const asked = location.hash.slice(1);
    const name = names.includes(asked) ? asked : names[0];
    for (const link of links) {
      const isCurrent = link.hash === `#${name}`;
      byId(link.hash.slice(1)).hidden = !isCurrent;
      if (isCurrent) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    onChange(name);
  };
  addEventListener("hashchange", show);
  show();
}
