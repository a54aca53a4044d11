// Runs before the first paint, so that a dark page does not flash white. Not a module for that.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;

  function chosen() {
    const asked = new URLSearchParams(location.search).get("theme");
    if (asked === "dark" || asked === "light" || asked === "auto") return asked;
    try {
      return localStorage.getItem("vllm-router.theme") || "auto";
    } catch {
      return "auto"; // storage is forbidden here
    }
  }

  function apply(choice) {
    const theme = choice === "auto" ? (dark.matches ? "dark" : "light") : choice;
    if (root.dataset.theme === theme) return;
    root.dataset.theme = theme;
    dispatchEvent(new Event("themechange"));
  }

  dark.addEventListener("change", () => apply(chosen()));
  apply(chosen());

  addEventListener("DOMContentLoaded", () => {
    const select = document.getElementById("theme");
    select.value = chosen();
    select.addEventListener("change", () => {
      try {
        localStorage.setItem("vllm-router.theme", select.value);
      } catch {
        // It holds until the page is left.
      }
      const address = new URL(location.href);
      address.searchParams.set("theme", select.value);
      history.replaceState(null, "", address);
      apply(select.value);
    });
  });
})();
