/*
 * Light, dark, or as the system is. Not a module: it runs before the page is first painted.
 */

(() => {
  const KEY = "early-exit-theme";
  const THEMES = ["auto", "light", "dark"];
  const root = document.documentElement;

  function apply(theme) {
    root.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) button.textContent = `Theme: ${theme}`;
  }

  const stored = localStorage.getItem(KEY);
  apply(THEMES.includes(stored) ? stored : "auto");

  document.addEventListener("DOMContentLoaded", () => {
    apply(root.dataset.theme);
    document.getElementById("theme").addEventListener("click", () => {
      const next = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
      localStorage.setItem(KEY, next);
      apply(next);
    });
  });
})();
