// The widget manager has defined its modules. From here on RequireJS hides from other scripts:
// parts of Mermaid would take it for their own loader, and no diagram would be drawn.
window.define = undefined;
