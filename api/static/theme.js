// Dark or light: as the system has it, until the switch says otherwise.

const NAME = "theme";
const system = matchMedia("(prefers-color-scheme: dark)");

const chosen = () => localStorage.getItem(NAME);
const current = () => chosen() ?? (system.matches ? "dark" : "light");
const other = () => (current() === "dark" ? "light" : "dark");

export function startTheme(button) {
  const show = () => {
    if (chosen()) document.documentElement.dataset.theme = chosen();
    button.textContent = other() === "dark" ? "Dark" : "Light";
    button.setAttribute("aria-label", `Switch to ${other()} colours`);
  };
  button.addEventListener("click", () => {
    localStorage.setItem(NAME, other());
    show();
  });
  system.addEventListener("change", show);
  show();
}
