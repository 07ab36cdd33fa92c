// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "MagistralBridge",
    platforms: [.macOS(.v14)],  // MLX's own floor, and that of custom executors
    products: [.library(name: "MagistralBridge", targets: ["MagistralBridge"])],
    targets: [
        .target(name: "MagistralBridge"),
        .executableTarget(name: "magistral-sample", dependencies: ["MagistralBridge"]),
        .executableTarget(name: "magistral-checks", dependencies: ["MagistralBridge"]),
    ]
)
