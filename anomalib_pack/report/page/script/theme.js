// Light or dark: as the system has it, until the button is pressed.

const root = document.documentElement;
const dark = window.matchMedia("(prefers-color-scheme: dark)");
let chosen = "";

function showTheme() {
  root.dataset.theme = chosen || (dark.matches ? "dark" : "light");
  const button = document.getElementById("theme");
  if (button) {
    button.hidden = false;
    button.textContent = root.dataset.theme === "dark" ? "☀ Light" : "☾ Dark";
    button.setAttribute("aria-label", `Switch to ${root.dataset.theme === "dark" ? "light" : "dark"} colours`);
  }
}
showTheme();
dark.addEventListener("change", showTheme);
