// The search quotes pages as they were written; without this, formulas in its results would show their backslashes.
const readable = (text) => text.replace(/\\[()[\]]/g, "").replace(/\\([A-Za-z]+)/g, "$1");

document.addEventListener("DOMContentLoaded", () => {
  const results = document.getElementById("search-results");
  if (!results) return;
  new MutationObserver(() => {
    const walker = document.createTreeWalker(results, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const node = walker.currentNode;
      if (node.data.includes("\\")) node.data = readable(node.data);
    }
  }).observe(results, { childList: true, subtree: true });
});
