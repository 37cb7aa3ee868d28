eval(require("fs").readFileSync(process.argv[2], "utf8"));
