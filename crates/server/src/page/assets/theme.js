// Sets the colours before the first paint, so this one is no module. The system's are used unless
// the reader has chosen.
(() => {
  try {
    const chosen = localStorage.getItem("locket.theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch {
    // Storage is turned off: the system's colours.
  }
})();
