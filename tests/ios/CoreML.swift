// Stubs of the part of Core ML that examples/ios/Decoder.swift uses, written from Apple's published
// documentation, so that Swift can check the types of the sample where there is no Core ML.

import Foundation

public enum MLComputeUnits: Int, Sendable {
    case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine
}

open class MLModelConfiguration {
    public init() {}
    open var computeUnits: MLComputeUnits = .all
    open var functionName: String?
}

public struct MLModelMetadataKey: Hashable, Sendable {
    public static let creatorDefinedKey = MLModelMetadataKey()
}

open class MLModelDescription {
    open var metadata: [MLModelMetadataKey: Any] { fatalError("a stub") }
}

public final class MLState {}

public protocol MLFeatureProvider {
    var featureNames: Set<String> { get }
    func featureValue(for featureName: String) -> MLFeatureValue?
}

open class MLDictionaryFeatureProvider: MLFeatureProvider {
    public init(dictionary: [String: Any]) throws {}
    open var featureNames: Set<String> { fatalError("a stub") }
    open func featureValue(for featureName: String) -> MLFeatureValue? { fatalError("a stub") }
}

public protocol MLShapedArrayScalar {}
extension Int32: MLShapedArrayScalar {}
extension Float: MLShapedArrayScalar {}
extension Double: MLShapedArrayScalar {}
extension Float16: MLShapedArrayScalar {}

public struct MLShapedArray<Scalar: MLShapedArrayScalar> {
    public init<S: Sequence>(scalars: S, shape: [Int]) where S.Element == Scalar {}
    public var scalars: [Scalar] { fatalError("a stub") }
    public var shape: [Int] { fatalError("a stub") }
}

open class MLFeatureValue {
    public init<Scalar: MLShapedArrayScalar>(shapedArray: MLShapedArray<Scalar>) {}
    public func shapedArrayValue<Scalar: MLShapedArrayScalar>(
        of type: Scalar.Type
    ) -> MLShapedArray<Scalar>? { fatalError("a stub") }
}

open class MLModel {
    public static func load(
        contentsOf url: URL, configuration: MLModelConfiguration
    ) async throws -> MLModel { fatalError("a stub") }
    open var modelDescription: MLModelDescription { fatalError("a stub") }
    open func makeState() -> MLState { fatalError("a stub") }
    open func prediction(
        from input: any MLFeatureProvider, using state: MLState
    ) async throws -> any MLFeatureProvider { fatalError("a stub") }
}
