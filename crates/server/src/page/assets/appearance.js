// The switch of the colours; `theme.js` sets them before the first paint.

const STORED = "locket.theme";

/** Makes the switch work. */
export function listenForColours() {
  const chosen = document.documentElement.dataset.theme ?? "system";
  for (const input of document.querySelectorAll('input[name="theme"]')) {
    if (!(input instanceof HTMLInputElement)) continue;
    input.checked = input.value === chosen;
    input.addEventListener("change", () => {
      if (input.value === "system") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = input.value;
      try {
        if (input.value === "system") localStorage.removeItem(STORED);
        else localStorage.setItem(STORED, input.value);
      } catch {
        // It holds until the page is left.
      }
    });
  }
}
